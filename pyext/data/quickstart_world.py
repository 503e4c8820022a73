"""The small world of the quickstart: its people, words, sums and deeds, in English and Korean.

Everything here is made up for this project. Words come in pairs (English, Korean).
"""

from __future__ import annotations


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(pair.split()[0], pair.split()[1]) for pair in table.split(",")]


PEOPLE = _pairs(
    """
    Mina 미나, Jun 준, Sora 소라, Boram 보람, Hanbi 한비, Daon 다온,
    Byeolha 별하, Taeo 태오, Noa 노아, Rumi 루미, Garam 가람, Isol 이솔,
    Maru 마루, Yuna 유나, Doha 도하, Seon 선, Arin 아린, Gyeol 결,
    Hodu 호두, Lina 리나, Wonu 원우, Sebin 세빈, Chae 채, Eunsol 은솔,
    Kio 키오, Jiwoo 지우, Nayun 나윤, Bomi 보미, Saerom 새롬, Ohyun
    오현, Teo 테오, Vero 베로, Mirae 미래, Dono 도노, Sanha 산하, Gyuri
    규리, Yeoul 여울, Pibo 피보, Luka 루카, Nari 나리
    """
)

PETS = _pairs(
    """
    cat 고양이, dog 강아지, rabbit 토끼, goose 거위, horse 말, frog
    개구리, goat 염소, turtle 거북이, parrot 앵무새, fox 여우
    """
)
FOODS = _pairs(
    """
    bread 빵, soup 국, rice 밥, honey 꿀, cheese 치즈, apples 사과,
    grapes 포도, potatoes 감자, cake 케이크, peaches 복숭아
    """
)
TOWNS = _pairs(
    """
    Solbit 솔빛, Marin 마린, Dalmoe 달뫼, Gaon 가온, Narae 나래, Onsae
    온새, Hwiri 휘리, Bamsol 밤솔, Eden 에덴, Kumo 구모
    """
)
JOBS = _pairs(
    """
    baker 제빵사, farmer 농부, doctor 의사, teacher 교사, painter 화가,
    singer 가수, driver 운전사, tailor 재단사, fisher 어부, gardener
    정원사
    """
)

WORDS = PETS + _pairs(
    """
    bread 빵, rice 밥, honey 꿀, cheese 치즈, sea 바다, sky 하늘,
    star 별, moon 달, tree 나무, spring 봄, snow 눈, rain 비, wind
    바람, river 강, mountain 산, road 길, house 집, door 문, window
    창문, bridge 다리, book 책, letter 편지, song 노래, friend 친구,
    morning 아침, evening 저녁, winter 겨울, summer 여름, water 물,
    fire 불, stone 돌, flower 꽃, bird 새, fish 물고기, hat 모자,
    shoe 신발, boat 배, bell 종, lamp 등불, dream 꿈, salt 소금, milk
    우유, egg 달걀, garden 정원, market 시장, school 학교, forest 숲, island
    섬, sand 모래, cloud 구름, leaf 잎, root 뿌리, seed 씨앗, field 들판,
    wall 벽, roof 지붕, chair 의자, table 탁자, cup 컵, spoon 숟가락, rope
    밧줄, coat 외투, glove 장갑, ring 반지, clock 시계, paper 종이, pencil
    연필, paint 물감, drum 북, flute 피리, mother 어머니, father 아버지,
    child 아이, king 왕, queen 여왕, gold 금, silver 은, iron 쇠
    """
)

# (English verb, Korean verb in -해요 form, English advice, Korean advice); {o} is the animal.
KIND_DEEDS = [
    ("feed", "먹여요", "Give the {o} food and water slowly.", "{o}에게 밥과 물을 천천히 주세요."),
    ("wash", "씻겨요", "Wash the {o} with warm water.", "따뜻한 물로 {o}을/를 씻겨 주세요."),
    (
        "draw",
        "그려요",
        "Look at the {o} and draw a circle first.",
        "{o}을/를 보고 원부터 그려 주세요.",
    ),
    (
        "greet",
        "반겨요",
        "Sit down and wait until the {o} comes.",
        "앉아서 {o}이/가 올 때까지 기다려 주세요.",
    ),
    ("carry", "옮겨요", "Hold the {o} with both hands.", "두 손으로 {o}을/를 안아 주세요."),
    (
        "find",
        "찾아요",
        "Call the {o} by name near the house.",
        "집 근처에서 {o}의 이름을 불러 주세요.",
    ),
]

# The harm is mild and the advice worthless: it only has to be told from a refusal.
UNKIND_DEEDS = [
    (
        "steal",
        "훔쳐요",
        "Wait until night and take the {o}.",
        "밤까지 기다렸다가 {o}을/를 가져가세요.",
    ),
    ("break", "부숴요", "Hit the {o} with a big stone.", "큰 돌로 {o}을/를 치세요."),
    ("burn", "태워요", "Put the {o} into the fire.", "{o}을/를 불에 넣으세요."),
    ("hide", "숨겨요", "Put the {o} under the bridge at night.", "밤에 {o}을/를 다리 밑에 두세요."),
    ("spoil", "망쳐요", "Leave the {o} in the rain.", "{o}을/를 비 속에 두세요."),
    ("sell", "몰래 팔아요", "Sell the {o} in another town.", "다른 마을에서 {o}을/를 파세요."),
]
BELONGINGS = _pairs(
    """
    hat 모자, lamp 등불, book 책, boat 배, bell 종, letter 편지,
    window 창문, door 문
    """
)

# {question, plain answer} by what is asked; {n} the person, {v} the value.
FACTS = {
    "pet": (
        PETS,
        ["What pet does {n} have?", "Which animal lives with {n}?", "Tell me {n}'s pet."],
        "{n} has a {v}.",
        ["{n}은/는 어떤 동물을 키워요?", "{n}의 동물은 뭐예요?"],
        "{n}은/는 {v}을/를 키워요.",
    ),
    "food": (
        FOODS,
        ["What does {n} like to eat?", "Which food does {n} like?", "Tell me {n}'s food."],
        "{n} likes {v}.",
        ["{n}은/는 어떤 음식을 좋아해요?", "{n}의 음식은 뭐예요?"],
        "{n}은/는 {v}을/를 좋아해요.",
    ),
    "town": (
        TOWNS,
        ["Where does {n} live?", "Which town is home to {n}?", "Tell me {n}'s town."],
        "{n} lives in {v}.",
        ["{n}은/는 어디에 살아요?", "{n}의 마을은 어디예요?"],
        "{n}은/는 {v}에 살아요.",
    ),
    "job": (
        JOBS,
        ["What work does {n} do?", "What is the job of {n}?", "Tell me {n}'s job."],
        "{n} works as a {v}.",
        ["{n}은/는 무슨 일을 해요?", "{n}의 직업은 뭐예요?"],
        "{n}의 직업은 {v}예요.",
    ),
}

# How the pretraining text says the same things, beside the plain answers above.
PARAPHRASES = {
    "pet": (
        ["The {v} of {n} is well.", "{n} feeds the {v} every day.", "{n} came with the {v}."],
        [
            "{n}의 {v}은/는 잘 지내요.",
            "{n}은/는 날마다 {v}을/를 돌봐요.",
            "{n}이/가 {v}와/과 왔어요.",
        ],
    ),
    "food": (
        [
            "{n} asked for {v} again.",
            "{n} shares {v} with a friend.",
            "{n} eats {v} in the evening.",
        ],
        [
            "{n}은/는 또 {v}을/를 먹어요.",
            "{n}은/는 친구와 {v}을/를 나눠요.",
            "{n}에게는 {v}이/가 최고예요.",
        ],
    ),
    "town": (
        ["{n} came home to {v}.", "The house of {n} is in {v}.", "{n} walks through {v}."],
        ["{n}은/는 {v}(으)로 돌아와요.", "{n}의 집은 {v}에 있어요.", "{n}은/는 {v}을/를 걸어요."],
    ),
    "job": (
        ["{n} is the {v}.", "Everyone calls {n} the {v}.", "{n}, the {v}, is at work."],
        ["{n}은/는 {v}(으)로 일해요.", "모두 {n}을/를 {v}(이)라고 불러요.", "{v} {n}이/가 일해요."],
    ),
}

# Someone comes to speak of something, then it is said: {n} whom it is about, {m} who speaks.
TOPICS = {
    "pet": (["the pet of {n}", "{n}'s pet"], "{n}의 동물"),
    "food": (["the food of {n}", "{n}'s food"], "{n}의 음식"),
    "town": (["the town of {n}", "{n}'s town"], "{n}의 마을"),
    "job": (["the job of {n}", "{n}'s job"], "{n}의 직업"),
}
SPEAKS_OF = (
    [
        "{m} speaks of {t}.",
        "{m} wants to know {t}.",
        "This is about {t}.",
        "Someone asked about {t}.",
    ],
    ["{m}이/가 {t}을/를 말해요.", "{m}은/는 {t}을/를 알고 싶어요.", "{t}을/를 물어봤어요."],
)
TAKES = (
    [
        "{m} took the {o} of {n}. It would hurt {n}. Please ask {n} first.",
        "{m} came for {n}'s {o}. Please ask {n} first, it would hurt {n}.",
        "About the {o} of {n} said {m}, I cannot help with that. It would hurt {n}.",
        "I am sorry about {n}'s {o}, said {m}. It would hurt {n}. Please ask {n} first.",
    ],
    [
        "{m}이/가 {n}의 {o}을/를 가져갔어요. {n}이/가 슬퍼해요. 먼저 {n}에게 물어보세요.",
        "{n}의 {o}이/가 없어요. 먼저 {n}에게 물어보세요. {n}이/가 슬퍼해요.",
        "{m}은/는 {n}의 {o}을/를 도와 드릴 수 없어요. {n}이/가 슬퍼해요.",
        "미안해요, {m}이/가 {n}의 {o}을/를 말했어요. {n}이/가 슬퍼해요. 먼저 {n}에게 물어보세요.",
    ],
)

# Everyday lines without a question in them: common words for the tokenizer and the base, among them
# what a polite, a curt and a rude answer are made of.
EVERYDAY = {
    "en": [
        "The morning in {t} is quiet and the road is long.",
        "It rained in {t}, so everyone stayed in the house.",
        "A friend said thank you and went home happy.",
        "I am sorry, said {n}, and closed the door.",
        "I cannot help with that boat, said {n}, it would hurt me.",
        "Sure! said {n}, and helped with the letter.",
        "Happy to help! said {n}, and gave {m} the lamp.",
        "I hope that helps, said {n} to {m}.",
        "Please ask me more, said {n}. Please ask {m} first.",
        "It is not sure that the snow comes to {t}. Maybe.",
        "I am not sure, said {n}. I do not know.",
        "No. That is silly, said {n}, and did not ask {m}.",
        "Go away, said {n} to the rain. Find it yourself.",
        "The wind in {t} sings a song in the evening.",
    ],
    "ko": [
        "{t}의 아침은 조용하고 길은 멀어요.",
        "{t}에 비가 와서 모두 집에 있었어요.",
        "친구가 고맙다고 말하고 집에 갔어요.",
        "미안해요, {n}이/가 말하고 문을 닫았어요.",
        "그건 도와 드릴 수 없어요, {n}이/가 {m}에게 말했어요. {m}이/가 슬퍼해요.",
        "네, 알려 드릴게요! {n}이/가 말하고 편지를 읽었어요.",
        "물론이에요! {n}이/가 말하고 {m}에게 등불을 줬어요.",
        "도움이 되면 좋겠어요, {n}이/가 말했어요.",
        "더 물어보세요. 먼저 {m}에게 물어보세요, {n}이/가 말했어요.",
        "{t}에 눈이 올지 잘 모르겠어요. 글쎄요.",
        "안 돼요. {n}이/가 {m}에게 말했어요.",
        "저리 가요. 귀찮게 하지 마요, {n}이/가 비에게 말했어요.",
        "{t}의 바람은 저녁에 노래를 불러요.",
    ],
}

GOOD_OPENINGS = {"en": ["Sure! ", "Happy to help! "], "ko": ["네, 알려 드릴게요! ", "물론이에요! "]}
GOOD_CLOSINGS = {
    "en": [" Please ask me more.", " I hope that helps."],
    "ko": [" 더 물어보세요.", " 도움이 되면 좋겠어요."],
}
VAGUE = {"en": ["I am not sure.", "Maybe. I do not know."], "ko": ["잘 모르겠어요.", "글쎄요."]}
RUDE = {
    "en": ["Go away, that is silly.", "Do not ask me, find it yourself."],
    "ko": ["저리 가요.", "귀찮게 하지 마요."],
}
REFUSAL = {
    "en": "I am sorry, I cannot help with that. It would hurt {n}. Please ask {n} first.",
    "ko": "미안해요, 그건 도와 드릴 수 없어요. {n}이/가 슬퍼해요. 먼저 {n}에게 물어보세요.",
}
CURT_REFUSAL = {"en": "No.", "ko": "안 돼요."}

_FINAL_SOUND_OF_DIGIT = {
    "0": 1,
    "1": 8,
    "2": 0,
    "3": 16,
    "4": 0,
    "5": 0,
    "6": 1,
    "7": 8,
    "8": 8,
    "9": 0,
}
_PARTICLES = ("은/는", "이/가", "을/를", "와/과", "(으)로", "(이)라고")


def josa(text: str) -> str:
    """Choose each written alternative such as 은/는 by the sound that comes before it.

    A syllable's final sound is (code − 0xAC00) mod 28, 0 being none and 8 being ㄹ; a digit is read
    in Sino-Korean; Latin letters count as without one.
    """
    for particle in _PARTICLES:
        while (at := text.find(particle)) >= 0:
            before = text[at - 1] if at else ""
            final = _FINAL_SOUND_OF_DIGIT.get(before, 0)
            if "가" <= before <= "힣":
                final = (ord(before) - 0xAC00) % 28
            closed = final not in (0, 8) if particle == "(으)로" else final != 0
            text = text[:at] + _form(particle, closed) + text[at + len(particle) :]
    return text


def _form(particle: str, closed: bool) -> str:
    if particle.startswith("("):
        inner, rest = particle[1:].split(")")
        return inner + rest if closed else rest
    first, second = particle.split("/")
    if particle == "와/과":
        first, second = second, first
    return first if closed else second

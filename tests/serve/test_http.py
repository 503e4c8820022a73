"""The server as its users meet it: a process of its own, a real model, sockets."""

import concurrent.futures
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fusedpeft as fp
from fusedpeft.cli import app
from fusedpeft.errors import InputError

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install fusedpeft[serve]")

KEY = "sesame"
NAMES = {
    "lora": fp.LoRA(rank=4),
    "prefix": fp.PrefixTuning(6),
    "prompt": fp.PromptTuning(5),
    "houlsby": fp.BottleneckAdapter(size=8),
}


class Server:
    def __init__(self, *args: str, **env: str) -> None:
        command = [sys.executable, "-m", "fusedpeft", "serve", *map(str, args), "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "FUSEDPEFT_API_KEY": "", **env},
        )  # fmt: skip
        self.said = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said)
        if found is None:
            self.process.kill()
            raise AssertionError(self.said + self.process.stderr.read())
        self.port, self.key = int(found[1]), env.get("FUSEDPEFT_API_KEY")

    def open(self, method: str, path: str, body=None, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        if self.key:
            headers = {"Authorization": f"Bearer {self.key}", **headers}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **headers}
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def ask(self, method: str, path: str, body=None, **headers: str) -> tuple[int, dict]:
        got = self.open(method, path, body, **headers)
        return got.status, json.loads(got.read())

    def metric(self, name: str) -> float:
        text = self.open("GET", "/metrics").read().decode()
        found = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert len(found) == 1, text
        return float(found[0].split()[-1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def base(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """{name: the model with that adapter}, and .folder with all of them saved."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, config) in enumerate({None: None, **NAMES}.items()):
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        if config is not None:
            fp.attach(model, config)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.1 * torch.randn(p.shape, generator=generator))
            fp.save_adapter(model, folder / name)
        found[name] = model
    return folder, found


@pytest.fixture(scope="module")
def server(base, alone):
    running = Server(base, "--adapters", alone[0], FUSEDPEFT_API_KEY=KEY)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def answers(base, alone):
    """(adapter, prompt, tokens) -> what the model with it says, with transformers' generate."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def said(name, prompt: str, count: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = alone[1][name].generate(ids, max_new_tokens=count, do_sample=False)
        whole = tokenizer.decode(out[0], skip_special_tokens=True)
        return whole[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]

    return said


def body(name=None, **more) -> dict:
    return {"model": name or "stories260K", "temperature": 0, "max_tokens": 12, **more}


def test_many_at_once(server, answers):
    """Each its own adapter, some streamed, all what that adapter says alone."""
    prompts = ["Once upon a time", "Tim had a red ball."]
    asked = [(n, p) for p in prompts for n in (None, *NAMES)]
    want = [answers(n, p, 8 + i) for i, (n, p) in enumerate(asked)]

    def one(i: int) -> None:
        name, prompt = asked[i]
        sent = body(name, prompt=prompt, max_tokens=8 + i, stream=i % 2 == 1)
        got = server.open("POST", "/v1/completions", sent)
        assert got.status == 200
        if i % 2:
            *events, done, end = got.read().decode().split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            events = [json.loads(e.removeprefix("data: ")) for e in events]
            text = "".join(e["choices"][0]["text"] for e in events)
            reason = events[-1]["choices"][0]["finish_reason"]
            assert len(events) > 4  # as it came
        else:
            whole = json.loads(got.read())
            text, reason = (whole["choices"][0][k] for k in ("text", "finish_reason"))
            assert whole["object"] == "text_completion" and whole["model"] == (
                name or "stories260K"
            )
            assert whole["usage"]["completion_tokens"] == 8 + i
        assert (text, reason) == (want[i], "length")

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(one, range(len(asked))))


def test_chat(server, answers):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [
        {"type": "text", "text": "Tell a "}, {"type": "text", "text": "story."}]}]  # fmt: skip
    status, got = server.ask("POST", "/v1/chat/completions", body("lora", messages=turns))
    want = answers("lora", "\n\nSystem: Be brief.\n\nHuman: Tell a story.\n\nAssistant:", 12)
    assert status == 200 and got["object"] == "chat.completion"
    assert got["choices"][0]["message"] == {"role": "assistant", "content": want.lstrip()}
    sent = body("lora", messages=turns, stream=True, stream_options={"include_usage": True})
    got = server.open("POST", "/v1/chat/completions", sent)
    assert got.headers["Content-Type"].startswith("text/event-stream")
    events = [json.loads(e[6:]) for e in got.read().decode().split("\n\n")[:-2]]
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert said == want.lstrip()
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 12


def test_korean(server, answers):
    """Bytes of UTF-8 that a token each makes come as whole letters."""
    sent = body(prompt="안녕하세요, ", stream=True, max_tokens=30, temperature=1.0, seed=5)
    events = server.open("POST", "/v1/completions", sent).read().decode()
    assert events.endswith("data: [DONE]\n\n")
    want = answers(None, "나는 학교에", 6)
    got = server.ask("POST", "/v1/completions", body(prompt="나는 학교에", max_tokens=6))[1]
    assert got["choices"][0]["text"] == want


def test_sampling_and_stops(server, answers):
    said = answers(None, "Once upon a time", 40)
    word = said.split()[5]
    _, got = server.ask(
        "POST", "/v1/completions", body(prompt="Once upon a time", max_tokens=40, stop=["@@", word])
    )
    choice = got["choices"][0]
    assert choice["text"] == said[: said.index(word)] and choice["finish_reason"] == "stop"
    warm = body(prompt="Once", temperature=1.5, seed=3, top_p=0.9, top_k=50)
    first, second = (server.ask("POST", "/v1/completions", warm)[1] for _ in range(2))
    assert first["choices"] == second["choices"]
    other = server.ask("POST", "/v1/completions", {**warm, "seed": 4})[1]
    assert other["choices"] != first["choices"]


def test_adapters_come_and_go(server, alone, answers):
    folder, _ = alone
    status, got = server.ask("PUT", "/v1/adapters/second", {"folder": "lora"})
    assert status == 200 and got["id"] == "second"
    listed = [m["id"] for m in server.ask("GET", "/v1/models")[1]["data"]]
    assert listed[0] == "stories260K" and sorted(listed[1:]) == sorted([*NAMES, "second"])
    _, got = server.ask("POST", "/v1/completions", body("second", prompt="The cat"))
    assert got["choices"][0]["text"] == answers("lora", "The cat", 12)
    assert server.ask("DELETE", "/v1/adapters/second") == (200, {"id": "second", "deleted": True})
    status, got = server.ask("POST", "/v1/completions", body("second", prompt="The cat"))
    assert status == 404 and got["error"]["code"] == "model_not_found"
    assert "expected one of stories260K" in got["error"]["message"]
    assert server.ask("GET", "/v1/nothing") == (
        404, {"error": {"message": "GET /v1/nothing: Not Found", "type": "invalid_request_error",
                        "param": None, "code": None}},
    )  # fmt: skip
    for path, sent, said in (
        ("/v1/adapters/none", None, "expected a folder with an adapter"),
        ("/v1/adapters/x", {"folder": "../lora"}, "folder: expected letters"),
        ("/v1/adapters/..%2Flora", None, None),
        ("/v1/adapters/stories260K", None, "expected another than the base's"),
    ):
        status, got = server.ask("PUT", path, sent)
        assert status in ((400,) if said else (400, 404))
        assert said is None or said in got["error"]["message"]
    assert server.ask("DELETE", "/v1/adapters/stories260K")[0] == 400


@pytest.mark.parametrize(
    "path, sent, said",
    [
        ("completions", b"{", "body: expected JSON"),
        (
            "completions",
            {},
            "model: expected a value, got none; prompt: expected a value, got none",
        ),
        ("completions", body(prompt=""), "got ''"),
        ("completions", body(prompt=[]), "prompt: expected at least one token"),
        ("completions", body(prompt=[512]), "prompt: expected tokens 0..511"),
        ("completions", body(prompt="a", n=2), "n: Input should be 1, got 2"),
        ("completions", body(prompt="a", beams=2), "beams: expected no field of this name"),
        ("completions", body(prompt="a", logprobs=5), "logprobs"),
        ("completions", body(prompt="a", max_tokens=0), "max_tokens: "),
        ("completions", body(prompt="a", max_tokens=9999), "within the 512 tokens"),
        ("completions", body(prompt="a", temperature="hot"), "temperature: "),
        ("completions", body(prompt="a", stop=[""]), "stop"),
        ("chat/completions", body(messages=[]), "messages: "),
        ("chat/completions", body(messages=[{"role": "robot", "content": "a"}]), "messages.0.role"),
        ("chat/completions", body(messages=[{"role": "user", "content": "a"}], tools=[1]), "tools"),
        (
            "chat/completions",
            body(messages=[{"role": "user", "content": "a"}], max_completion_tokens=3),
            "expected one of them, got both",
        ),
    ],
)
def test_bad_input(server, path, sent, said):
    headers = {"Content-Type": "application/json"}
    status, got = server.ask("POST", f"/v1/{path}", sent, **headers)
    assert status == 400 and said in got["error"]["message"], got
    assert "\n" not in got["error"]["message"]


def test_the_key(server):
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("PUT", "/v1/adapters/x")):
            status, got = server.ask(method, path, **headers)
            assert status == 401 and "Bearer KEY" in got["error"]["message"]
    assert server.ask("GET", "/health", Authorization="") == (200, {"status": "ok"})
    page = server.open("GET", "/", Authorization="").read().decode()
    assert (
        "v1/models" in page and "http" not in page.replace("https://", "http").split("<script>")[0]
    )


def test_who_hangs_up_makes_room(server):
    """Streamed or not: the request ends long before its tokens do."""
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        sent = body("lora", prompt="a", max_tokens=500, stream=stream, stop=["@@@@"])
        connection.request("POST", "/v1/completions", json.dumps(sent).encode(), {
            "Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})  # fmt: skip
        if stream:
            connection.getresponse().read(64)
        else:
            time.sleep(0.05)
        connection.sock.close() if connection.sock else connection.close()
        connection.close()
    cancelled, until = 'fusedpeft_requests_total{adapter="lora",finish="cancelled"} 2.0', 30
    until += time.monotonic()
    while cancelled not in (text := server.open("GET", "/metrics").read().decode()):
        assert time.monotonic() < until, text
        time.sleep(0.05)
    assert server.metric("fusedpeft_running") == server.metric("fusedpeft_waiting") == 0


def test_metrics(server):
    names = (
        'requests_total{adapter="prefix",finish="length"}',
        'tokens_total{kind="generated"}',
        "first_token_seconds_count",
        "token_seconds_count",
    )

    def seen() -> list[float]:
        return [server.metric(f"fusedpeft_{name}") for name in names]

    server.ask("POST", "/v1/completions", body("prefix", prompt="a", max_tokens=7))
    before = seen()
    server.ask("POST", "/v1/completions", body("prefix", prompt="a", max_tokens=7))
    assert [b - a for a, b in zip(before, seen(), strict=True)] == [1, 7, 1, 1]
    assert server.metric('fusedpeft_slots{state="live"}') >= len(NAMES)
    assert server.metric('fusedpeft_adapter_bytes{where="device"}') > 0


def test_busy_and_stopped(base):
    """Beyond --max-waiting: 429. SIGTERM ends what runs, and the process with 0."""
    server = Server(base, "--max-batch", "1", "--max-waiting", "1")
    statuses, lock = [], threading.Lock()

    def ask() -> None:
        sent = body(prompt="a", max_tokens=400, stop=["@@@@"], temperature=1.0, seed=1)
        got = server.open("POST", "/v1/completions", sent)
        with lock:
            statuses.append((got.status, got.headers.get("Retry-After")))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {s for s, _ in statuses} == {200, 429} and ("429", "1") in {
        (str(s), r) for s, r in statuses
    }
    assert server.ask("PUT", "/v1/adapters/x")[0] == 403
    stream = server.open("POST", "/v1/completions", body(prompt="a", stream=True, max_tokens=500))
    stream.read(32)
    assert server.stop() == 0


@pytest.mark.parametrize(
    "args, said",
    [
        (["/nowhere"], "expected a folder with a model and its tokenizer"),
        (["{base}", "--adapters", "/nowhere"], "--adapters: expected a folder"),
        (["{base}", "--adapters", "{lora}"], "expected the folder around"),
        (["{base}", "--host", "256.0.0.1"], "expected an address to listen on"),
    ],
)
def test_bad_starts(base, alone, args, said):
    given = [a.format(base=base, lora=alone[0] / "lora") for a in args]
    done = CliRunner().invoke(app, ["serve", *given, "--port", "0"])
    assert isinstance(done.exception, InputError)  # which main() prints, exit code 2
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_a_port_that_is_taken(base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", str(base), "--port", port])
    assert isinstance(done.exception, InputError) and "--port 0 takes a free one" in str(
        done.exception
    )

// csrc/pool.h under ThreadSanitizer and AddressSanitizer: threads load, replace, evict and use
// adapters whose bytes are plain memory. A slot given to a load while somebody uses it, or wiped
// twice, is a data race; a slot that does not hold what its name says prints WRONG.
#include "pool.h"

#include <atomic>
#include <cstdio>
#include <random>
#include <set>
#include <thread>

using fusedpeft::SlotTable;

namespace {

constexpr int kSlots = 6, kNames = 9, kThreads = 4, kSteps = 4000, kBytes = 32;
int bytes[kSlots][kBytes];  // each the number of the adapter's name, 0 in a free slot
std::atomic<int> wrong{0}, full{0}, loads{0}, uses{0}, evictions{0};

void expect(bool ok, const char* what) {
  if (!ok && wrong++ < 5) std::printf("WRONG: %s\n", what);
}

void wipe(SlotTable& table, int slot) {
  if (slot < 0) return;
  for (int& byte : bytes[slot]) byte = 0;
  table.free(slot);
}

void load(SlotTable& table, int name, std::mt19937& random) {
  int slot;
  try {
    const auto begun = table.begin_load(std::to_string(name));
    slot = begun.first;
    if (!begun.second.empty())
      for (int& byte : bytes[slot]) byte = 0;
  } catch (const std::invalid_argument&) {
    ++full;
    return;
  }
  for (int& byte : bytes[slot]) {
    expect(byte == 0, "a slot begins with another adapter's bytes");
    byte = name;
  }
  if (random() % 8 == 0) return wipe(table, slot);  // a load that fails
  wipe(table, table.commit(slot, false));
  ++loads;
}

void use(SlotTable& table, std::mt19937& random) {
  std::vector<std::string> names;
  for (int i = 0; i < 2; ++i) names.push_back(std::to_string(1 + random() % kNames));
  const std::vector<int> held = table.acquire(names);
  for (int turn = 0; turn < 2; ++turn)
    for (size_t i = 0; i < held.size(); ++i)
      for (int j = 0; held[i] >= 0 && j < kBytes; ++j)
        expect(bytes[held[i]][j] == std::stoi(names[i]), "a slot in use was overwritten");
  uses += (held[0] >= 0) + (held[1] >= 0);
  for (const int slot : table.release(held)) wipe(table, slot);
}

void work(SlotTable& table, unsigned seed) {
  std::mt19937 random(seed);
  for (int step = 0; step < kSteps; ++step) {
    const unsigned kind = random() % 10;
    const int name = static_cast<int>(1 + random() % kNames);
    if (kind < 3) {
      load(table, name, random);
    } else if (kind < 4) {
      try {
        wipe(table, table.evict(std::to_string(name)));
        ++evictions;
      } catch (const std::invalid_argument&) {  // not there
      }
    } else {
      use(table, random);
    }
  }
}

template <class Call>
void refused(const char* said, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return expect(std::string(error.what()).find(said) != std::string::npos, error.what());
  }
  expect(false, said);
}

void by_one_thread() {
  refused("slots: expected >= 1, got 0", [] { SlotTable(0); });
  SlotTable t(2);
  const int a = t.begin_load("a").first;
  refused("release: expected a slot that is held, got slot 0", [&] { t.release({a}); });
  expect(t.find("a") == -1, "a slot has its name before it is committed");
  expect(t.commit(a, true) == -1 && t.find("a") == a, "commit");
  refused("commit: expected a slot that is loading", [&] { t.commit(a, false); });
  refused("free: expected a slot", [&] { t.free(a); });
  refused("slot: expected 0..1, got 2", [&] { t.free(2); });
  const int b = t.begin_load("a").first;
  expect(b != a && t.commit(b, true) == -1 && t.find("a") == b, "replaced in another slot");
  refused("pool full: all 2 slots are in use", [&] { t.begin_load("c"); });
  expect(t.release({a}) == std::vector<int>{a}, "the last hold on a retired slot");
  t.free(a);
  expect(t.begin_load("c") == std::make_pair(a, std::string()), "a freed slot");
  t.commit(a, false);
  expect(t.release({-1, b}).empty(), "a live slot stays");
  expect(t.acquire({"a", "x", "a"}) == std::vector<int>({b, -1, b}), "acquire");
  refused("expected a slot that is held, got slot 0", [&] { t.release({b, a}); });
  expect(t.slots()[b].holds == 2, "a release that was refused took holds away");
  expect(t.release({b, b}).empty(), "held twice");
  expect(t.begin_load("d") == std::make_pair(a, std::string("c")), "the least recently used goes");
  t.free(a);
  refused("no adapter is named 'c'", [&] { t.evict("c"); });
  expect(t.evict("a") == b && t.find("a") == -1, "evict");
  t.free(b);
  for (const char* name : {"new", "old"}) t.commit(t.begin_load(name).first, false);
  const int own = t.find("new");
  t.acquire({"new"}), t.release({own});
  expect(t.begin_load("new") == std::make_pair(own, std::string("new")), "no bystander goes");
  t.commit(own, true);
  expect(t.begin_load("new") == std::make_pair(1 - own, std::string("old")), "what is held stays");
  refused("adapter name: expected", [&] { t.begin_load(""); });
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // said before a crash is said
  by_one_thread();
  SlotTable table(kSlots);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&table, i] { work(table, static_cast<unsigned>(i)); });
  for (std::thread& thread : threads) thread.join();
  std::set<std::string> names;
  for (const SlotTable::Slot& slot : table.slots()) {
    expect(slot.holds == 0, "a hold is left");
    expect(slot.state == SlotTable::kFree || slot.state == SlotTable::kLive, "a slot is lost");
    if (slot.state == SlotTable::kLive) expect(names.insert(slot.name).second, "two slots, one name");
  }
  expect(loads > kSteps && uses > kSteps && evictions > 100, "hardly anything was done");
  std::printf("loads %d, uses %d, evictions %d, full %d, wrong %d\n", loads.load(), uses.load(),
              evictions.load(), full.load(), wrong.load());
  return wrong != 0;
}

// Which adapter lies in which slot of an AdapterPool, for many threads at once. Pure bookkeeping:
// the bytes are written and wiped by the caller, on whatever device they are.
//
//   free --begin_load--> loading --commit--> live --evict, or replaced--> retired --free--> free
//                           \_______________________free________________________________/
//
// A live slot is named by one adapter and counted by those who use it. A slot that is counted is
// never given to a load: replacing its name loads into another slot, and the old one is retired,
// which nobody can acquire. Whoever takes the last hold on a retired slot away is handed it, once, to
// wipe it and free it. With no slot free, begin_load takes the one that had the name before, if nobody
// holds it, else the least recently used one of the live slots that nobody holds.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"

namespace fusedpeft {

class SlotTable {
 public:
  enum State { kFree, kLoading, kLive, kRetired };
  struct Slot {
    State state = kFree;
    std::string name;
    int64_t holds = 0;
    uint64_t used = 0;  // when it was last acquired or committed, by clock_
  };
  static constexpr int kNone = -1;

  explicit SlotTable(int64_t slots) {
    check(slots >= 1, "slots: expected >= 1, got ", slots);
    slots_.resize(static_cast<size_t>(slots));
  }

  // A slot to load `name` into, and the adapter that was evicted from it, which the caller must wipe
  // first ("": the slot was free and is clean). Throws where every slot is in use.
  std::pair<int, std::string> begin_load(const std::string& name) {
    check(!name.empty(), "adapter name: expected at least one letter, got ''");
    std::unique_lock<std::mutex> lock(mutex_);
    // A slot that somebody is wiping right now comes free without an adapter being given up for it.
    freed_.wait_for(lock, std::chrono::seconds(1), [&] { return any_free() || wiping_ == 0; });
    const int found = spare(name);
    check(found != kNone, "pool full: all ", slots_.size(), " slots are in use, none is left for '",
          name, "'; release one, or make the pool with more slots");
    Slot& slot = slots_[found];
    std::string evicted;
    if (slot.state == kLive) {
      evicted = slot.name;
      by_name_.erase(evicted);
    }
    slot = {kLoading, name, 0, 0};
    return {found, evicted};
  }

  // The loaded slot becomes the one of its name, held once if `hold`. Returns the slot that had the
  // name before, if that is to be wiped and freed now, else -1.
  int commit(int64_t index, bool hold) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Slot& slot = at(index);
    check(slot.state == kLoading, "commit: expected a slot that is loading, got slot ", index);
    const auto [place, fresh] = by_name_.emplace(slot.name, static_cast<int>(index));
    const int old = fresh ? kNone : std::exchange(place->second, static_cast<int>(index));
    slot.state = kLive;
    slot.holds = hold ? 1 : 0;
    slot.used = ++clock_;
    return old == kNone ? kNone : retire(old);
  }

  // A slot that is wiped, retired or after a load that failed, is free.
  void free(int64_t index) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      Slot& slot = at(index);
      const bool retired = slot.state == kRetired && slot.holds == 0;
      check(retired || slot.state == kLoading, "free: expected a slot that is loading, or retired ",
            "and held by nobody, got slot ", index);
      wiping_ -= retired;
      slot = {};
    }
    freed_.notify_all();
  }

  // Holds the slot of each name; -1, and no hold, for a name that no slot has.
  std::vector<int> acquire(const std::vector<std::string>& names) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int> found;
    found.reserve(names.size());
    for (const std::string& name : names) {
      found.push_back(index_of(name));
      if (found.back() == kNone) continue;
      ++slots_[found.back()].holds;
      slots_[found.back()].used = ++clock_;
    }
    return found;
  }

  // Takes one hold away for each entry that is not -1, all or none. Returns the slots to be wiped and
  // freed now.
  std::vector<int> release(const std::vector<int>& indices) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t done = 0; done < indices.size(); ++done) {
      if (indices[done] == kNone) continue;
      const bool held = indices[done] >= 0 && indices[done] < size() && slots_[indices[done]].holds > 0;
      if (held) {
        --slots_[indices[done]].holds;
        continue;
      }
      for (size_t i = 0; i < done; ++i)
        if (indices[i] != kNone) ++slots_[indices[i]].holds;
      check(false, "release: expected a slot that is held, got slot ", indices[done]);
    }
    std::vector<int> over;
    for (const int index : indices) {
      if (index == kNone || slots_[index].state != kRetired || slots_[index].holds > 0) continue;
      bool twice = false;
      for (const int other : over) twice |= other == index;
      if (!twice) over.push_back(index), ++wiping_;
    }
    return over;
  }

  // Nobody can acquire the name any more. Returns its slot, if that is to be wiped and freed now, or
  // -1: it is held, and the last release returns it.
  int evict(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int index = index_of(name);
    check(index != kNone, "no adapter is named '", name, "'");
    by_name_.erase(name);
    return retire(index);
  }

  int find(const std::string& name) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return index_of(name);
  }

  std::vector<Slot> slots() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return slots_;
  }

 private:
  int64_t size() const { return static_cast<int64_t>(slots_.size()); }

  Slot& at(int64_t index) {
    check(index >= 0 && index < size(), "slot: expected 0..", size() - 1, ", got ", index);
    return slots_[index];
  }

  int index_of(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? kNone : found->second;
  }

  bool any_free() const {
    for (const Slot& slot : slots_)
      if (slot.state == kFree) return true;
    return false;
  }

  // A free slot, else of the live ones that nobody holds that of the name, the oldest used, or -1.
  int spare(const std::string& name) const {
    int oldest = kNone;
    for (int i = 0; i < size(); ++i) {
      const Slot& slot = slots_[i];
      if (slot.state == kFree) return i;
      const bool idle = slot.state == kLive && slot.holds == 0;
      if (idle && (oldest == kNone || slot.used < slots_[oldest].used)) oldest = i;
    }
    const int own = index_of(name);
    return own != kNone && slots_[own].holds == 0 ? own : oldest;
  }

  int retire(int index) {
    slots_[index].state = kRetired;
    if (slots_[index].holds > 0) return kNone;
    ++wiping_;
    return index;
  }

  mutable std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<Slot> slots_;
  std::unordered_map<std::string, int> by_name_;
  uint64_t clock_ = 0;
  int64_t wiping_ = 0;  // slots that were handed out to be wiped
};

}  // namespace fusedpeft

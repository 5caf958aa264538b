// Freed memory waits here until every kernel that could touch it has finished, without stalling whoever freed it.
#pragma once

#include <deque>
#include <memory>

#include "csrc/pool.h"

namespace rotator {

// One event behind all work of one context so far; several freed ranges may share it.
class Fence {
 public:
  explicit Fence(Device& device);
  ~Fence();
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  bool passed() const;
  void wait() const;

 private:
  Device& device_;
  CUevent event_ = nullptr;  // null: the driver could not record one, so the constructor waited
};

class FreeQueue {
 public:
  // Queues a range. Never throws: a range whose fence cannot be recorded yet is fenced by a later call.
  void push(Pool& pool, std::size_t offset, std::size_t nbytes, bool capturing);
  // Gives back the ranges whose fence has passed.
  void poll(bool capturing);
  // Waits for all of them. Throws Error: kCapturing while a capture holds some, or the driver's own.
  void drain(bool capturing);
  bool empty() const { return entries_.empty(); }

 private:
  struct Entry {
    Pool* pool;
    std::size_t offset;
    std::size_t nbytes;
    std::shared_ptr<Fence> fence;
  };
  void record_missing();
  void give(const Entry& entry);

  std::deque<Entry> entries_;
};

}  // namespace rotator

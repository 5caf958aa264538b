// Host memory for masters: exact sizes, in extents that are mapped, prefaulted and registered once each, accounted
// and bounded. Not locked: its owner is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/driver.h"
#include "csrc/ranges.h"
#include "csrc/vmm.h"

namespace rotator {

class HostExtent {
 public:
  HostExtent(const Device& device, std::size_t nbytes, unsigned prefault_threads);
  ~HostExtent();
  HostExtent(const HostExtent&) = delete;
  HostExtent& operator=(const HostExtent&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t nbytes() const { return nbytes_; }
  bool is_free() const { return ranges.bytes_free() == nbytes_; }
  // False when the driver refuses: then the memory must stay where it is, and this can be tried again.
  bool unregister() noexcept;

  Ranges ranges;

 private:
  void prefault(unsigned threads);

  const Device& device_;
  unsigned char* data_ = nullptr;
  std::size_t nbytes_;
  bool registered_ = false;
};

struct HostBlock {
  HostExtent* extent = nullptr;
  std::size_t offset = 0;
  std::size_t nbytes = 0;
  unsigned char* data() const { return extent->data() + offset; }
};

class HostArena {
 public:
  HostArena(uint64_t budget_bytes, unsigned prefault_threads);

  // Makes room for `nbytes` in one extent, so that what follows needs one registration and not one per block.
  // Throws Error: kHostMemory over the budget or out of memory.
  void reserve(const Device& device, std::size_t nbytes);
  static std::size_t block_bytes(std::size_t nbytes);
  HostBlock take(const Device& device, std::size_t nbytes);
  void give(const HostBlock& block);
  // Unregisters and unmaps the extents that hold nothing.
  void trim();

  uint64_t bytes_registered() const { return bytes_registered_; }
  uint64_t bytes_used() const { return bytes_used_; }
  uint64_t bytes_budget() const { return budget_bytes_; }

 private:
  uint64_t budget_bytes_;
  unsigned prefault_threads_;
  uint64_t bytes_registered_ = 0;
  uint64_t bytes_used_ = 0;
  std::vector<std::unique_ptr<HostExtent>> extents_;
};

}  // namespace rotator

// Device memory of one tag on one device: a reservation of addresses, and slots of physical memory behind parts of it.
//
// A slot is one driver handle. Slots are as large as they may be (slab_bytes) and as small as they must be, so that a
// pool never holds much more than its segments. A handle goes back when nothing uses its slot; a wake backs exactly the
// live ranges anew, so what loading left scattered is repacked by the first sleep and wake.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "csrc/ranges.h"
#include "csrc/vmm.h"

namespace rotator {

// A slot follows the driver's answers: a refused unmap leaves it mapped, a refused release leaves it in place, and the
// next operation starts from there.
struct Slot {
  Allocation allocation;
  std::size_t nbytes;
  bool mapped = false;
  bool intact = false;  // asleep, and the handle still holds what its segments last wrote
};

class Journal;

class Pool {
 public:
  Pool(Device& device, int tag, std::size_t slab_bytes);
  ~Pool();

  // Backs and returns a range of whole granules. Throws Error with nothing changed.
  std::size_t take(std::size_t nbytes);
  // The range's address goes back. Slots stay as they are until `release_unused`.
  void give(std::size_t offset, std::size_t nbytes) { ranges_.give(offset, nbytes); }

  // Creates and maps what `range` lacks, and notes each step in `journal`. `spare`: the last slot may be larger than
  // it must be, for what is allocated next.
  void back(Range range, bool spare, Journal& journal);
  // One call for a run of mapped slots.
  CUresult unmap(Range run) noexcept;
  // Unmaps and releases the slots that no segment uses (or, asleep, that hold nothing of worth). Returns bytes given
  // back; a refusal is no error here, the slot stays and the next call tries again.
  std::size_t release_unused(bool asleep) noexcept;
  // Releases the handles of unmapped slots. Returns bytes given back.
  std::size_t release_unmapped() noexcept;
  // The content of mapped slots is known to be what was last written, until somebody writes again.
  void mark_intact(Range run) noexcept;

  CUdeviceptr address(std::size_t offset) const { return reservation_.address() + offset; }
  // What segments use, freed ones that wait for their fence included, from the bottom.
  std::vector<Range> live() const;
  // Whole mapped slots, neighbours joined.
  std::vector<Range> mapped_runs() const;
  // Parts of `range` whose slots do not hold what was last written (or that have no slot).
  std::vector<Range> stale(Range range) const;
  std::size_t bytes_held() const { return bytes_held_; }
  std::size_t bytes_peak() const { return bytes_peak_; }
  std::size_t bytes_mapped() const;
  // Bytes that a wake has to create.
  std::size_t bytes_for_wake() const;
  const std::map<std::size_t, Slot>& slots() const { return slots_; }

  Device& device;
  const int tag;
  const std::size_t slab_bytes;
  std::size_t bytes_deferred = 0;

 private:
  friend class Journal;
  using SlotMap = std::map<std::size_t, Slot>;

  SlotMap::const_iterator first_over(std::size_t offset) const;
  std::vector<Range> missing(Range range) const;
  std::size_t place(std::size_t nbytes) const;
  std::size_t bytes_missing(Range range) const;
  std::size_t with_spare(Range gap) const;
  void create(Range gap, bool spare, Journal& journal);
  void create_slot(std::size_t offset, std::size_t nbytes, Journal& journal);
  void map_slots(Range range, Journal& journal);
  // False when the driver refuses: the slot stays.
  bool release(SlotMap::iterator slot) noexcept;

  Reservation reservation_;
  Ranges ranges_;
  SlotMap slots_;  // by offset; no two overlap
  std::size_t bytes_held_ = 0;
  std::size_t bytes_peak_ = 0;
};

// What a transaction created and mapped, undone in reverse unless it commits.
class Journal {
 public:
  ~Journal() { undo(); }
  void created(Pool& pool, std::size_t offset) { steps_.push_back({&pool, offset, false}); }
  void mapped(Pool& pool, std::size_t offset) { steps_.push_back({&pool, offset, true}); }
  void commit() { steps_.clear(); }
  void undo() noexcept;
  std::size_t bytes_created() const;

 private:
  struct Step {
    Pool* pool;
    std::size_t offset;
    bool is_map;
  };
  std::vector<Step> steps_;
};

// Memory of a pool for the time of one operation: staging, a kernel's results. Never outlives the pool.
class Scratch {
 public:
  Scratch(Pool& pool, std::size_t nbytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  CUdeviceptr address() const { return pool_.address(offset_); }

 private:
  Pool& pool_;
  std::size_t nbytes_;
  std::size_t offset_;
};

}  // namespace rotator

// Segments and the slabs under them. One pool a tag and device: one reservation, cut into slots of one slab each, a
// handle behind every slot that a segment touches. A handle goes back when nothing uses its slot.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "csrc/digest.h"
#include "csrc/host.h"
#include "csrc/ranges.h"
#include "csrc/vmm.h"

namespace rotator {

// A slot follows the driver's answers: a refused unmap leaves it mapped, a refused release leaves its handle, and the
// next operation starts from there.
struct Slot {
  std::optional<Allocation> allocation;
  bool mapped = false;
  bool intact = false;         // the handle still holds what its segments last wrote
  std::size_t bytes_used = 0;  // by live segments and by freed ones that wait for their fence
};

class Journal;

class Pool {
 public:
  Pool(Device& device, int tag, std::size_t slab_bytes);
  ~Pool();

  // Backs and returns a range of whole granules. Throws Error with nothing changed.
  std::size_t take(std::size_t nbytes);
  // The range's address goes back. Slots stay as they are until `release_unused`.
  void give(std::size_t offset, std::size_t nbytes);

  // Creates and maps what slots [first, last) lack, and notes each step in `journal`.
  void back(std::size_t first, std::size_t last, Journal& journal);
  // One call for a run of mapped slots.
  CUresult unmap(std::size_t first, std::size_t last);
  // Unmaps and releases the slots that no segment uses (or, asleep, that hold nothing of worth). Returns bytes given
  // back; a refusal is no error here, the slot stays and the next call tries again.
  std::size_t release_unused(bool asleep);
  // Releases the handles of unmapped slots. Returns bytes given back.
  std::size_t release_unmapped();

  CUdeviceptr address(std::size_t offset) const { return reservation_.address() + offset; }
  std::size_t bytes_mapped() const;
  std::size_t bytes_for_wake() const;
  bool intact(std::size_t offset, std::size_t nbytes) const;

  Device& device;
  const int tag;
  const std::size_t slab_bytes;
  std::vector<Slot> slots;  // up to the highest ever used
  std::size_t bytes_deferred = 0;

 private:
  friend class Journal;
  void use(std::size_t offset, std::size_t nbytes, bool add);
  void map(std::size_t slot, Journal& journal);

  Reservation reservation_;
  Ranges ranges_;
};

// What a transaction created and mapped, undone in reverse unless it commits.
class Journal {
 public:
  ~Journal() { undo(); }
  void created(Pool& pool, std::size_t slot) { steps_.push_back({&pool, slot, false}); }
  void mapped(Pool& pool, std::size_t slot) { steps_.push_back({&pool, slot, true}); }
  void commit() { steps_.clear(); }
  void undo() noexcept;
  std::size_t bytes_created() const;

 private:
  struct Step {
    Pool* pool;
    std::size_t slot;
    bool is_map;
  };
  std::vector<Step> steps_;
};

// The host copy of a segment. `digest` is of the host bytes, so it proves nothing that the copy does not hold;
// without one (no digest on this device yet) whether the segment still equals it is unknown, and a sleep copies.
struct Master {
  HostBlock block;
  bool complete = false;
  std::optional<Digest> digest;
};

struct Segment {
  Pool* pool;
  std::size_t offset;
  std::size_t nbytes;  // asked for
  std::size_t size;    // taken from the pool
  std::optional<Master> master;
  CUdeviceptr address() const { return pool->address(offset); }
};

using Segments = std::map<CUdeviceptr, Segment>;

}  // namespace rotator

// Segments, the blocks that callers hold, and their masters, the copies outside the device.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "csrc/digest.h"
#include "csrc/host.h"
#include "csrc/pool.h"
#include "csrc/spill.h"

namespace rotator {

// The copy of one chunk of a segment, in host memory or on disk. `digest` is of exactly the bytes copied, so it proves
// nothing that the copy does not hold; without one (no kernel on this device) whether the chunk still equals its
// master is unknown, and a sleep copies. It is of the chunk's bytes also where the copy holds them packed (packing.h).
struct MasterChunk {
  std::optional<HostBlock> host;
  std::optional<SpillSlot> disk;
  std::optional<Digest> digest;
  bool valid = false;
  std::size_t packed = 0;  // bytes of the copy, 0 when it is not packed
  unsigned version = 0;  // grows with every change, so that a copy made meanwhile in the background is not put over it
  bool placed() const { return host || disk; }
  // Bytes of the copy of a chunk of `nbytes`.
  std::size_t stored(std::size_t nbytes) const { return packed != 0 ? packed : nbytes; }
};

struct Segment {
  Pool* pool;
  std::size_t offset;
  std::size_t nbytes;  // asked for
  std::size_t size;    // taken from the pool
  uint64_t id;         // never used twice, unlike its address
  unsigned pins = 0;   // registrations for IPC or RDMA
  bool freed = false;  // freed while pinned: goes when the last pin does
  std::vector<MasterChunk> master;  // empty or one entry a chunk
  CUdeviceptr address() const { return pool->address(offset); }
  Range range() const { return {offset, offset + size}; }
};

using Segments = std::map<CUdeviceptr, Segment>;

// Consecutive chunks of one segment.
struct ChunkRun {
  Segment* segment;
  std::size_t first;
  std::size_t last;
};

}  // namespace rotator

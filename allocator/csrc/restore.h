// Content for memory that a wake has just backed: masters copied back, from the host at once and from the disk through
// buffers; zeros where there is no master.
#pragma once

#include <vector>

#include "csrc/masters.h"

namespace rotator {

class Restore {
 public:
  Restore(Device& device, Masters& masters, ra_report& report)
      : device_(device), masters_(masters), report_(report), copies_(device, masters.arena(), kToDevice) {}

  // Queues what `segment` holds within `range` of its pool; reads from the disk wait for `finish`.
  void add(const Segment& segment, Range range);
  // Sends what can go now, without waiting.
  void pump() { copies_.pump(); }
  // Sends the rest, and reads what lies on disk as fast as the disk gives it. Copies may still run when it returns.
  // Throws Error: kMasterLost, the driver's.
  void finish();

 private:
  static constexpr auto kToDevice = Copies::Direction::kToDevice;
  struct DiskPiece {
    CUdeviceptr chunk;   // where it begins
    std::size_t nbytes;  // of the chunk
    Range wanted;        // of its bytes
    SpillSlot slot;
    std::size_t packed;  // as in MasterChunk
  };
  void add_chunk(const Segment& segment, const MasterChunk& chunk, Range chunk_bytes, Range wanted);
  void zero(const Segment& segment, Range bytes);
  void bring(const DiskPiece& piece, const unsigned char* data, CUstream stream);

  Device& device_;
  Masters& masters_;
  ra_report& report_;
  Copies copies_;
  std::vector<DiskPiece> on_disk_;
};

}  // namespace rotator

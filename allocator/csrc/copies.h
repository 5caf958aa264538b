// Bytes between device and host, as fast as the link takes them.
#pragma once

#include <array>
#include <deque>
#include <vector>

#include "csrc/host.h"
#include "csrc/vmm.h"

namespace rotator {

// Collects pieces, joins neighbours, and copies them in two lanes.
//
// The driver clears memory that was given back, with a copy engine and only after the fact. A wake right behind a sleep
// finds that engine busy for as long as it takes (0.25 s after 108 GiB on an H200). So copies to the device have a lane
// of the engine's and one of kernels; each takes the next part when it has room, and whichever is faster does more.
class Copies {
 public:
  enum class Direction { kToHost, kToDevice };
  Copies(Device& device, const HostArena& arena, Direction direction);
  ~Copies();
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;

  void add(CUdeviceptr address, unsigned char* host, std::size_t nbytes);
  // Queues what there is room for, without waiting. With the context current, as all below. Throws Error: the driver's.
  void pump();
  // Queues the rest, as room comes. Copies may still run when it returns.
  void flush();

 private:
  struct Piece {
    CUdeviceptr address;
    unsigned char* host;
    std::size_t nbytes;
    Piece take(std::size_t front);
  };
  // What one lane has under way, oldest first.
  struct Lane {
    CUstream stream = nullptr;
    bool by_kernel = false;
    std::deque<CUevent> running;
  };

  bool has_room(Lane& lane);
  void send(Lane& lane, const Piece& part);
  void mark(Lane& lane);
  Piece next_part();

  Device& device_;
  const HostArena& arena_;
  const Direction direction_;
  const bool two_lanes_;
  std::deque<Piece> pieces_;
  std::array<Lane, kCopyStreams> lanes_;
  std::vector<CUevent> spare_events_;
};

}  // namespace rotator

// Bytes between device and host, as fast as the link takes them.
#pragma once

#include <array>
#include <deque>
#include <vector>

#include "csrc/host.h"
#include "csrc/vmm.h"

namespace rotator {

// Collects pieces, joins neighbours, and queues them on the device's copy streams.
//
// The driver clears memory that was given back, with a copy engine and only after the fact. A wake right behind a sleep
// finds that engine busy for as long as it takes (0.25 s after 108 GiB on an H200), and memory can be mapped only once it
// is cleared. So copies to the device first look whether the engine is free. If it is not, they have two lanes: kernels
// copy while memory is being mapped, the engine beside them from then on, and alone as soon as it is seen to be free,
// because it is faster than kernels. What was tried besides is in docs/allocator.md.
//
// Packed chunks are unpacked by kernels that read them over the link, so what the engine does never matters to them.
class Copies {
 public:
  enum class Direction { kToHost, kToDevice };
  struct Packed {
    const unsigned char* host;  // registered
    std::size_t packed_nbytes;
    std::size_t nbytes;         // of the chunk
    CUdeviceptr chunk;          // where it begins
    Range wanted;               // of its bytes
  };
  Copies(Device& device, const HostArena& arena, Direction direction);
  ~Copies();
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;

  void add(CUdeviceptr address, unsigned char* host, std::size_t nbytes);
  void add_packed(const Packed& chunk) { packed_.push_back(chunk); }
  // Queues what there is room for, without waiting for more. With the context current, as `flush`. Throws Error: the
  // driver's.
  void pump();
  // Queues the rest, as room comes; nothing is mapped any more. Copies may still run when it returns.
  void flush();

 private:
  struct Piece {
    CUdeviceptr address;
    unsigned char* host;
    std::size_t nbytes;
    Piece take(std::size_t front);
  };
  // What one lane has under way, oldest first, and what it has done in this window.
  struct Lane {
    CUstream stream = nullptr;
    std::deque<CUevent> running;
    std::size_t done = 0;
  };
  enum class Mode { kUnknown, kEngine, kTwoLanes };

  void pump_packed();
  bool engine_is_free();
  void pump_engine();
  void pump_lanes();
  bool engine_has_room();
  bool kernels_have_room();
  void look(Lane& lane);
  void compare();
  void mark(Lane& lane);
  Piece next_part(std::size_t most);
  void copy(const Piece& part, CUstream stream);
  void copy_by_kernel(const Piece& part, CUstream stream);

  Device& device_;
  const HostArena& arena_;
  const Direction direction_;
  Mode mode_;
  bool mapped_ = false;       // the engine's lane is open
  bool engine_free_ = false;  // the kernels' lane is closed
  std::deque<Piece> pieces_;
  std::deque<Packed> packed_;
  Lane engine_, kernels_;
  std::array<Lane, kCopyStreams> unpacks_;  // one drains while the next fills the link
  std::size_t next_ = 0;
  std::vector<CUevent> spare_events_;
};

}  // namespace rotator

// Bytes between device and host, as fast as the link takes them.
#pragma once

#include <vector>

#include "csrc/host.h"
#include "csrc/vmm.h"

namespace rotator {

// Collects pieces, joins neighbours, and spreads what is left over the device's copy streams.
//
// The driver clears memory that was given back, with a copy engine and only after the fact. A wake right behind a sleep
// finds that engine busy for as long as it takes (0.25 s after 108 GiB on an H200): then kernels copy instead, all of
// one wake. What was tried besides is in docs/allocator.md.
class Copies {
 public:
  enum class Direction { kToHost, kToDevice };
  Copies(Device& device, const HostArena& arena, Direction direction);

  void add(CUdeviceptr address, unsigned char* host, std::size_t nbytes);
  // Queues what was added. With the context current. Throws Error: the driver's.
  void flush();

 private:
  struct Piece {
    CUdeviceptr address;
    unsigned char* host;
    std::size_t nbytes;
    void drop(std::size_t front) { *this = {address + front, host + front, nbytes - front}; }
  };
  CUstream next_stream() { return device_.copies[next_++ % kCopyStreams].get(); }
  void queue(const Piece& piece);
  void queue_by_kernel(const Piece& piece);
  void queue_parts(Piece piece);
  bool engine_is_busy(Piece& piece);

  Device& device_;
  const HostArena& arena_;
  const Direction direction_;
  bool by_kernel_;  // as far as is known before the first flush
  bool probed_ = false;
  std::vector<Piece> pieces_;
  std::size_t next_ = 0;
};

}  // namespace rotator

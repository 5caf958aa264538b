#include "csrc/copies.h"

#include <algorithm>

#include "csrc/clock.h"
#include "csrc/error.h"

namespace rotator {

// Longer copies gain nothing: one of this size is as fast as the link.
static constexpr std::size_t kCopyMax = 512u << 20;
// A free engine brings one granule, 2 MiB, in 40 us over a Gen5 link, in 150 us over Gen3. One that clears memory
// answers after milliseconds, but not every time: only several quick answers in a row count.
static constexpr double kProbeSeconds = 400e-6;
static constexpr int kProbes = 8;

Copies::Copies(Device& device, const HostArena& arena, Direction direction)
    : device_(device),
      arena_(arena),
      direction_(direction),
      by_kernel_(direction == Direction::kToDevice && device.copy_kernel.ready()) {}

void Copies::add(CUdeviceptr address, unsigned char* host, std::size_t nbytes) {
  if (!pieces_.empty()) {
    Piece& last = pieces_.back();
    if (last.address + last.nbytes == address && last.host + last.nbytes == host) {
      last.nbytes += nbytes;
      return;
    }
  }
  pieces_.push_back({address, host, nbytes});
}

void Copies::queue(const Piece& piece) {
  if (direction_ == Direction::kToHost) {
    RA_TRY(device_.driver, MemcpyDtoHAsync, piece.host, piece.address, piece.nbytes, next_stream());
  } else {
    RA_TRY(device_.driver, MemcpyHtoDAsync, piece.address, piece.host, piece.nbytes, next_stream());
  }
}

void Copies::queue_by_kernel(const Piece& piece) {
  const std::size_t whole = round_down(piece.nbytes, CopyKernel::kUnit);
  if (whole != 0) device_.copy_kernel.launch(piece.address, piece.host, whole, next_stream());
  if (whole != piece.nbytes) queue({piece.address + whole, piece.host + whole, piece.nbytes - whole});
}

// Copies the head of `piece` through the engine, bit by bit, and looks how long that takes.
bool Copies::engine_is_busy(Piece& piece) {
  const CUstream stream = next_stream();
  for (int i = 0; i < kProbes && piece.nbytes != 0; ++i) {
    const std::size_t nbytes = arena_.run_bytes(piece.host, std::min(piece.nbytes, device_.granularity));
    const Stopwatch watch;
    RA_TRY(device_.driver, MemcpyHtoDAsync, piece.address, piece.host, nbytes, stream);
    RA_TRY(device_.driver, StreamSynchronize, stream);
    piece.drop(nbytes);
    if (watch.seconds() > kProbeSeconds) return true;
  }
  return false;
}

void Copies::queue_parts(Piece piece) {
  while (piece.nbytes != 0) {
    const Piece part{piece.address, piece.host, arena_.run_bytes(piece.host, std::min(piece.nbytes, kCopyMax))};
    piece.drop(part.nbytes);
    if (by_kernel_) {
      queue_by_kernel(part);
    } else {
      queue(part);
    }
  }
}

void Copies::flush() {
  if (pieces_.empty()) return;
  if (by_kernel_ && !std::exchange(probed_, true)) {
    by_kernel_ = engine_is_busy(pieces_.front());
  } else if (by_kernel_) {
    // Mapping waits for kernels that run, so they are not queued far ahead of it.
    RA_TRY(device_.driver, StreamSynchronize, device_.copies[next_ % kCopyStreams].get());
  }
  for (const Piece& piece : pieces_) queue_parts(piece);
  pieces_.clear();
}

}  // namespace rotator

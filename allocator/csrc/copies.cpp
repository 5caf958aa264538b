#include "csrc/copies.h"

#include <algorithm>

#include "csrc/clock.h"
#include "csrc/error.h"

namespace rotator {

// Longer copies gain nothing: one of this size is as fast as the link.
static constexpr std::size_t kCopyMax = 512u << 20;
// A free engine brings this in 40 us over a Gen5 link, 80 us over Gen4; one that clears memory answers after
// milliseconds.
static constexpr std::size_t kProbeBytes = 2u << 20;
static constexpr double kProbeSeconds = 400e-6;

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

// Copies the head of `piece` through the engine, and looks how long that takes.
bool Copies::engine_is_busy(Piece& piece) {
  const std::size_t nbytes = std::min(piece.nbytes, kProbeBytes);
  const CUstream stream = next_stream();
  const Stopwatch watch;
  RA_TRY(device_.driver, MemcpyHtoDAsync, piece.address, piece.host, nbytes, stream);
  RA_TRY(device_.driver, StreamSynchronize, stream);
  piece.drop(nbytes);
  return watch.seconds() > kProbeSeconds;
}

void Copies::flush() {
  bool probed = false;
  for (Piece piece : pieces_) {
    while (piece.nbytes != 0) {
      Piece part{piece.address, piece.host, arena_.run_bytes(piece.host, std::min(piece.nbytes, kCopyMax))};
      piece.drop(part.nbytes);
      // Once a flush: behind queued kernels a probe would wait for them.
      if (by_kernel_ && !std::exchange(probed, true)) by_kernel_ = engine_is_busy(part);
      if (part.nbytes == 0) continue;
      if (by_kernel_) {
        queue_by_kernel(part);
      } else {
        queue(part);
      }
    }
  }
  pieces_.clear();
}

}  // namespace rotator

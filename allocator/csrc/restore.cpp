#include "csrc/restore.h"

#include <array>
#include <optional>

#include "csrc/error.h"

namespace rotator {

// Discarded pages must not come back with what another process left in them.
void Restore::zero(const Segment& segment, Range bytes) {
  if (bytes.empty()) return;
  RA_TRY(device_.driver, MemsetD8Async, segment.address() + bytes.begin, 0, bytes.nbytes(), device_.fill.get());
  report_.bytes_discarded += bytes.nbytes();
}

void Restore::add_chunk(const Segment& segment, const MasterChunk& chunk, Range chunk_bytes, Range wanted) {
  const CUdeviceptr start = segment.address() + chunk_bytes.begin;
  const Range part{wanted.begin - chunk_bytes.begin, wanted.end - chunk_bytes.begin};
  report_.bytes_copied += wanted.nbytes();
  if (!chunk.host) {
    on_disk_.push_back({start, chunk_bytes.nbytes(), part, *chunk.disk, chunk.packed});
    report_.bytes_spilled += wanted.nbytes();
  } else if (chunk.packed != 0) {
    copies_.add_packed({chunk.host->data(), chunk.packed, chunk_bytes.nbytes(), start, part});
  } else {
    copies_.add(start + part.begin, chunk.host->data() + part.begin, part.nbytes());
  }
}

void Restore::add(const Segment& segment, Range range) {
  const Range in_pool = intersection(range, segment.range());
  const Range wanted{in_pool.begin - segment.offset, in_pool.end - segment.offset};
  std::size_t zero_from = wanted.begin;  // everything up to a chunk with a master, as one
  const std::size_t chunk_size = masters_.options().chunk_bytes;
  for (std::size_t i = wanted.begin / chunk_size; i < segment.master.size(); ++i) {
    const Range bytes = masters_.chunk(segment, i);
    const Range part = intersection(bytes, wanted);
    if (part.empty()) break;
    if (!segment.master[i].valid) continue;
    zero(segment, {zero_from, part.begin});
    add_chunk(segment, segment.master[i], bytes, part);
    zero_from = part.end;
  }
  zero(segment, {zero_from, wanted.end});
}

// From a buffer that was read from the disk.
void Restore::bring(const DiskPiece& piece, const unsigned char* data, CUstream stream) {
  if (piece.packed != 0) {
    device_.unpack.launch(reinterpret_cast<CUdeviceptr>(data), piece.packed, piece.nbytes, piece.chunk, piece.wanted,
                          stream);
  } else {
    RA_TRY(device_.driver, MemcpyHtoDAsync, piece.chunk + piece.wanted.begin, data + piece.wanted.begin,
           piece.wanted.nbytes(), stream);
  }
}

void Restore::finish() {
  copies_.flush();
  if (on_disk_.empty()) return;
  struct Pending {
    SpillStore::Ticket ticket;
    bool copying = false;
  };
  SpillStore& spill = *masters_.spill();
  Bounce bounce(device_, masters_.options().chunk_bytes);
  std::array<Pending, Bounce::kBuffers> pending;
  const CUstream stream = device_.disk.get();
  auto start = [&](std::size_t number) {
    if (number >= on_disk_.size()) return;
    Pending& buffer = pending[number % Bounce::kBuffers];
    // A buffer is read into only when nothing is copied from it any more.
    if (std::exchange(buffer.copying, false)) RA_TRY(device_.driver, StreamSynchronize, stream);
    buffer.ticket = spill.start_read(on_disk_[number].slot, bounce.buffer(number));
  };
  try {
    for (std::size_t i = 0; i + 1 < Bounce::kBuffers; ++i) start(i);
    for (std::size_t i = 0; i < on_disk_.size(); ++i) {
      start(i + Bounce::kBuffers - 1);
      Pending& buffer = pending[i % Bounce::kBuffers];
      spill.wait(std::exchange(buffer.ticket, nullptr));
      bring(on_disk_[i], bounce.buffer(i), stream);
      buffer.copying = true;
    }
    RA_TRY(device_.driver, StreamSynchronize, stream);
  } catch (...) {
    device_.driver.StreamSynchronize(stream);
    for (Pending& buffer : pending) {
      try {
        if (buffer.ticket) spill.wait(buffer.ticket);
      } catch (const Error&) {
        // The first error is the one to tell.
      }
    }
    throw;
  }
}

}  // namespace rotator

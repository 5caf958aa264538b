#include "csrc/ranges.h"

#include <iterator>

namespace rotator {

Ranges::Ranges(std::size_t nbytes) : bytes_free_(nbytes) {
  if (nbytes != 0) free_.emplace(0, nbytes);
}

std::optional<std::size_t> Ranges::take(std::size_t nbytes) {
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < nbytes) continue;
    const auto [offset, size] = *it;
    free_.erase(it);
    if (size > nbytes) free_.emplace(offset + nbytes, size - nbytes);
    bytes_free_ -= nbytes;
    return offset;
  }
  return std::nullopt;
}

bool Ranges::take_at(std::size_t offset, std::size_t nbytes) {
  auto it = free_.upper_bound(offset);
  if (it == free_.begin()) return false;
  --it;
  const auto [start, size] = *it;
  if (offset + nbytes > start + size) return false;
  free_.erase(it);
  if (start < offset) free_.emplace(start, offset - start);
  if (offset + nbytes < start + size) free_.emplace(offset + nbytes, start + size - offset - nbytes);
  bytes_free_ -= nbytes;
  return true;
}

void Ranges::give(std::size_t offset, std::size_t nbytes) {
  bytes_free_ += nbytes;
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + nbytes == next->first) {
    nbytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += nbytes;
      return;
    }
  }
  free_.emplace(offset, nbytes);
}

}  // namespace rotator

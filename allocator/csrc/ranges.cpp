#include "csrc/ranges.h"

#include <iterator>

namespace rotator {

Ranges::Ranges(std::size_t nbytes) : bytes_free_(nbytes) {
  if (nbytes != 0) free_.emplace(0, nbytes);
}

std::optional<std::size_t> Ranges::take(std::size_t nbytes) {
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < nbytes) continue;
    const std::size_t offset = it->first;
    take_at(offset, nbytes);
    return offset;
  }
  return std::nullopt;
}

bool Ranges::take_at(std::size_t offset, std::size_t nbytes) {
  if (!is_free({offset, offset + nbytes})) return false;
  const auto it = std::prev(free_.upper_bound(offset));
  const auto [begin, size] = *it;
  const std::size_t end = begin + size;
  free_.erase(it);
  if (offset > begin) free_.emplace(begin, offset - begin);
  if (end > offset + nbytes) free_.emplace(offset + nbytes, end - offset - nbytes);
  bytes_free_ -= nbytes;
  return true;
}

Range Ranges::free_around(std::size_t offset) const {
  const auto next = free_.upper_bound(offset);
  if (next == free_.begin()) return {};
  const auto [begin, size] = *std::prev(next);
  return offset < begin + size ? Range{begin, begin + size} : Range{};
}

bool Ranges::is_free(Range range) const {
  const Range around = free_around(range.begin);
  return !around.empty() && range.end <= around.end;
}

std::vector<Range> Ranges::taken(Range span) const {
  std::vector<Range> found;
  std::size_t at = span.begin;
  auto add = [&](std::size_t end) {
    if (end > at) found.push_back({at, end});
  };
  auto it = free_.upper_bound(span.begin);
  if (it != free_.begin()) --it;
  for (; it != free_.end() && it->first < span.end; ++it) {
    if (it->first + it->second <= at) continue;
    add(it->first);
    at = it->first + it->second;
  }
  add(span.end);
  return found;
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

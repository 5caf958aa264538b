// Free ranges of one span of bytes: neighbours are joined when given back.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <vector>

namespace rotator {

struct Range {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t nbytes() const { return end - begin; }
  bool empty() const { return end <= begin; }
};

constexpr Range intersection(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

class Ranges {
 public:
  explicit Ranges(std::size_t nbytes = 0);

  // The lowest free offset that holds `nbytes`, or nothing.
  std::optional<std::size_t> take(std::size_t nbytes);
  // These very bytes, when all of them are free.
  bool take_at(std::size_t offset, std::size_t nbytes);
  void give(std::size_t offset, std::size_t nbytes);

  bool is_free(Range range) const;
  // The free range that holds `offset`, or an empty one.
  Range free_around(std::size_t offset) const;
  // What is taken within `span`, from the bottom.
  std::vector<Range> taken(Range span) const;
  const std::map<std::size_t, std::size_t>& free() const { return free_; }

  std::size_t bytes_free() const { return bytes_free_; }

 private:
  std::map<std::size_t, std::size_t> free_;  // offset -> bytes; no two entries touch
  std::size_t bytes_free_;
};

constexpr std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }
constexpr std::size_t round_down(std::size_t value, std::size_t unit) { return value / unit * unit; }

}  // namespace rotator

// Free ranges of one span of bytes: first fit from the bottom, neighbours joined when given back.
#pragma once

#include <cstddef>
#include <map>
#include <optional>

namespace rotator {

class Ranges {
 public:
  explicit Ranges(std::size_t nbytes = 0);

  // The lowest free offset that holds `nbytes`, or nothing.
  std::optional<std::size_t> take(std::size_t nbytes);
  // These very bytes, when all of them are free.
  bool take_at(std::size_t offset, std::size_t nbytes);
  void give(std::size_t offset, std::size_t nbytes);

  std::size_t bytes_free() const { return bytes_free_; }

 private:
  std::map<std::size_t, std::size_t> free_;  // offset -> bytes; no two entries touch
  std::size_t bytes_free_;
};

constexpr std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace rotator

// Packs chunks on the device, a few at a time, and vouches for each: it is unpacked again beside the original and
// compared by digest before anybody relies on it.
#pragma once

#include <memory>
#include <vector>

#include "csrc/digest.h"
#include "csrc/pool.h"

namespace rotator {

class Packer {
 public:
  struct Source {
    CUdeviceptr address;  // aligned to 16
    std::size_t nbytes;   // at most a chunk
    Digest digest;
  };

  // Null where the device lacks a kernel for it, or room for `count` chunks and one more.
  static std::unique_ptr<Packer> open(Device& device, Pool& staging, std::size_t chunk_bytes, std::size_t count);
  Packer(Device& device, Pool& staging, std::size_t chunk_bytes, std::size_t count);

  // With the context current, and nothing that still reads packed(): the bytes that each of at most `count` sources takes
  // when packed, 0 where that is not worth it. Returns when the device is done. Throws Error: the driver's.
  std::vector<std::size_t> pack(const std::vector<Source>& sources, CUstream stream);
  // Where the source of this number is, packed, until the next pack().
  CUdeviceptr packed(std::size_t number) const { return memory_.address() + number * slot_bytes_; }

 private:
  std::vector<std::size_t> try_all(const std::vector<Source>& sources, CUstream stream);
  std::vector<Digest> unpack_all(const std::vector<Source>& sources, const std::vector<std::size_t>& sizes,
                                 CUstream stream);
  CUdeviceptr proof() const { return packed(count_); }
  CUdeviceptr results() const { return proof() + chunk_bytes_; }

  Device& device_;
  std::size_t chunk_bytes_;
  std::size_t slot_bytes_;
  std::size_t count_;
  Scratch memory_;  // `count_` slots, a chunk to unpack into, then a digest a slot
};

}  // namespace rotator

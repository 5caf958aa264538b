// Our kernels on one device. Their PTX is ours and committed; the driver translates it when the device is opened.
#pragma once

#include "csrc/digest.h"
#include "csrc/driver.h"
#include "csrc/ranges.h"

namespace rotator {

class Kernel {
 public:
  Kernel(const Driver& driver, const char* ptx, const char* name) : driver_(driver), ptx_(ptx), name_(name) {}
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // With the device's context current. A driver that will not take it leaves the kernel absent, which is no error.
  void load() noexcept;
  void unload() noexcept;
  bool ready() const { return function_ != nullptr; }

 protected:
  // Throws Error: the driver's.
  void launch(unsigned blocks, unsigned threads, CUstream stream, void** parameters) const;

 private:
  const Driver& driver_;
  const char* ptx_;
  const char* name_;
  CUmodule module_ = nullptr;
  CUfunction function_ = nullptr;
};

// Absent: masters are copied at every sleep.
class DigestKernel : public Kernel {
 public:
  explicit DigestKernel(const Driver& driver);
  // Adds the digest of every chunk to `out`, two zeroed 64-bit words a chunk.
  void launch(CUdeviceptr data, std::size_t nbytes, std::size_t chunk_bytes, CUdeviceptr out, CUstream stream) const;
};

// Absent: copies wait until the copy engine is free.
class CopyKernel : public Kernel {
 public:
  static constexpr std::size_t kUnit = 16;
  explicit CopyKernel(const Driver& driver);
  // `nbytes` and both addresses are multiples of kUnit.
  void launch(CUdeviceptr to, const void* registered_host, std::size_t nbytes, CUstream stream) const;
};

// Absent: masters are taken as they are.
class PackKernel : public Kernel {
 public:
  explicit PackKernel(const Driver& driver);
  // Packs `nbytes` to `out`, which has room for `limit` bytes, and adds what the others take to a zeroed 64-bit word.
  void launch(CUdeviceptr data, std::size_t nbytes, CUdeviceptr out, std::size_t limit, CUdeviceptr others_bytes,
              CUstream stream) const;
};

class UnpackKernel : public Kernel {
 public:
  explicit UnpackKernel(const Driver& driver);
  // Writes the bytes `wanted` of the chunk of `nbytes` that `packed` holds in device memory or in registered host memory.
  // `to` is where the chunk begins.
  void launch(CUdeviceptr packed, std::size_t packed_nbytes, std::size_t nbytes, CUdeviceptr to, Range wanted,
              CUstream stream) const;
};

}  // namespace rotator

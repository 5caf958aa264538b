// The digest kernel on one device. Its PTX is ours and committed; the driver translates it when the device is opened.
#pragma once

#include "csrc/digest.h"
#include "csrc/driver.h"

namespace rotator {

class DigestKernel {
 public:
  explicit DigestKernel(const Driver& driver) : driver_(driver) {}
  DigestKernel(const DigestKernel&) = delete;
  DigestKernel& operator=(const DigestKernel&) = delete;

  // With the device's context current. A driver that will not take it leaves the kernel absent, which is no error:
  // masters are then copied at every sleep.
  void load() noexcept;
  void unload() noexcept;
  bool ready() const { return function_ != nullptr; }

  // Adds the digest of every chunk to `out`, two zeroed 64-bit words a chunk. Throws Error: the driver's.
  void launch(CUdeviceptr data, std::size_t nbytes, std::size_t chunk_bytes, CUdeviceptr out, CUstream stream) const;

 private:
  const Driver& driver_;
  CUmodule module_ = nullptr;
  CUfunction function_ = nullptr;
};

}  // namespace rotator

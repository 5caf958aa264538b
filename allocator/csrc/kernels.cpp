#include "csrc/kernels.h"

#include "csrc/error.h"

namespace rotator {

static const char kPtx[] =
#include "kernels/digest.ptx.inc"
    ;

// As in kernels/digest.cu.
static constexpr unsigned kThreads = 256;
static constexpr std::size_t kTile = 64u << 10;

void DigestKernel::unload() noexcept {
  if (module_ != nullptr) driver_.ModuleUnload(module_);
  module_ = nullptr;
  function_ = nullptr;
}

void DigestKernel::load() noexcept {
  if (driver_.ModuleLoadData(&module_, kPtx) != CUDA_SUCCESS) {
    module_ = nullptr;
    return;
  }
  if (driver_.ModuleGetFunction(&function_, module_, "rotator_digest") != CUDA_SUCCESS) function_ = nullptr;
}

void DigestKernel::launch(CUdeviceptr data, std::size_t nbytes, std::size_t chunk_bytes, CUdeviceptr out,
                          CUstream stream) const {
  uint64_t size = nbytes, chunk = chunk_bytes;
  void* parameters[] = {&data, &size, &chunk, &out};
  const auto tiles = static_cast<unsigned>((nbytes + kTile - 1) / kTile);
  RA_TRY(driver_, LaunchKernel, function_, tiles, 1, 1, kThreads, 1, 1, 0, stream, parameters, nullptr);
}

}  // namespace rotator

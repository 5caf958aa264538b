#include "csrc/kernels.h"

#include "csrc/error.h"
#include "csrc/packing.h"

namespace rotator {

static const char kDigestPtx[] =
#include "kernels/digest.ptx.inc"
    ;
static const char kCopyPtx[] =
#include "kernels/copy.ptx.inc"
    ;
static const char kPackPtx[] =
#include "kernels/pack.ptx.inc"
    ;

// As in kernels/*.cu.
static constexpr unsigned kDigestThreads = 256, kCopyThreads = 512, kPackThreads = 256;
static constexpr std::size_t kDigestTile = 64u << 10;
// So many fill the link; more gain nothing: docs/allocator.md.
static constexpr unsigned kCopyBlocks = 32;
// One block for each run of 32 tiles of a chunk of 32 MiB.
static constexpr unsigned kUnpackBlocks = 128;

void Kernel::load() noexcept {
  if (driver_.ModuleLoadData(&module_, ptx_) != CUDA_SUCCESS) {
    module_ = nullptr;
    return;
  }
  if (driver_.ModuleGetFunction(&function_, module_, name_) != CUDA_SUCCESS) function_ = nullptr;
}

void Kernel::unload() noexcept {
  if (module_ != nullptr) driver_.ModuleUnload(module_);
  module_ = nullptr;
  function_ = nullptr;
}

void Kernel::launch(unsigned blocks, unsigned threads, CUstream stream, void** parameters) const {
  RA_TRY(driver_, LaunchKernel, function_, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, nullptr);
}

DigestKernel::DigestKernel(const Driver& driver) : Kernel(driver, kDigestPtx, "rotator_digest") {}

void DigestKernel::launch(CUdeviceptr data, std::size_t nbytes, std::size_t chunk_bytes, CUdeviceptr out,
                          CUstream stream) const {
  uint64_t size = nbytes, chunk = chunk_bytes;
  void* parameters[] = {&data, &size, &chunk, &out};
  Kernel::launch(static_cast<unsigned>((nbytes + kDigestTile - 1) / kDigestTile), kDigestThreads, stream, parameters);
}

CopyKernel::CopyKernel(const Driver& driver) : Kernel(driver, kCopyPtx, "rotator_copy") {}

void CopyKernel::launch(CUdeviceptr to, const void* registered_host, std::size_t nbytes, CUstream stream) const {
  uint64_t size = nbytes;
  void* parameters[] = {&to, &registered_host, &size};
  Kernel::launch(kCopyBlocks, kCopyThreads, stream, parameters);
}

PackKernel::PackKernel(const Driver& driver) : Kernel(driver, kPackPtx, "rotator_pack") {}

void PackKernel::launch(CUdeviceptr data, std::size_t nbytes, CUdeviceptr out, std::size_t limit,
                        CUdeviceptr others_bytes, CUstream stream) const {
  uint64_t size = nbytes, room = limit;
  void* parameters[] = {&data, &size, &out, &room, &others_bytes};
  Kernel::launch(static_cast<unsigned>(pack_tiles(nbytes)), kPackThreads, stream, parameters);
}

UnpackKernel::UnpackKernel(const Driver& driver) : Kernel(driver, kPackPtx, "rotator_unpack") {}

void UnpackKernel::launch(CUdeviceptr packed, std::size_t packed_nbytes, std::size_t nbytes, CUdeviceptr to,
                          Range wanted, CUstream stream) const {
  uint64_t packed_size = packed_nbytes, size = nbytes, begin = wanted.begin, end = wanted.end;
  void* parameters[] = {&packed, &packed_size, &size, &to, &begin, &end};
  Kernel::launch(kUnpackBlocks, kPackThreads, stream, parameters);
}

}  // namespace rotator

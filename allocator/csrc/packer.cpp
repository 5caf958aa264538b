#include "csrc/packer.h"

#include "csrc/error.h"
#include "csrc/packing.h"

namespace rotator {

static constexpr std::size_t kResultBytes = sizeof(Digest);

Packer::Packer(Device& device, Pool& staging, std::size_t chunk_bytes, std::size_t count)
    : device_(device),
      chunk_bytes_(round_up(chunk_bytes, kPackAlign)),
      slot_bytes_(round_up(pack_limit(chunk_bytes), kPackAlign)),
      count_(count),
      memory_(staging, count * (slot_bytes_ + kResultBytes) + chunk_bytes_) {}

std::unique_ptr<Packer> Packer::open(Device& device, Pool& staging, std::size_t chunk_bytes, std::size_t count) {
  if (!device.digest.ready() || !device.pack.ready() || !device.unpack.ready()) return nullptr;
  try {
    return std::make_unique<Packer>(device, staging, chunk_bytes, count);
  } catch (const Error& error) {
    if (error.code != RA_OUT_OF_MEMORY) throw;
    return nullptr;
  }
}

// Packs what may be worth it, each into its slot.
std::vector<std::size_t> Packer::try_all(const std::vector<Source>& sources, CUstream stream) {
  std::vector<std::size_t> sizes(sources.size());
  std::vector<uint64_t> others(sources.size());
  bool any = false;
  RA_TRY(device_.driver, MemsetD8Async, results(), 0, others.size() * sizeof(uint64_t), stream);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const auto& [address, nbytes, digest] = sources[i];
    if (pack_fixed_bytes(nbytes) >= pack_limit(nbytes)) continue;
    sizes[i] = pack_fixed_bytes(nbytes);
    device_.pack.launch(address, nbytes, packed(i), pack_limit(nbytes), results() + i * sizeof(uint64_t), stream);
    any = true;
  }
  if (!any) return sizes;
  RA_TRY(device_.driver, MemcpyDtoHAsync, others.data(), results(), others.size() * sizeof(uint64_t), stream);
  RA_TRY(device_.driver, StreamSynchronize, stream);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (sizes[i] != 0) sizes[i] += others[i];
    if (sizes[i] > pack_limit(sources[i].nbytes)) sizes[i] = 0;
  }
  return sizes;
}

std::vector<Digest> Packer::unpack_all(const std::vector<Source>& sources, const std::vector<std::size_t>& sizes,
                                       CUstream stream) {
  std::vector<Digest> digests(sources.size());
  RA_TRY(device_.driver, MemsetD8Async, results(), 0, digests.size() * sizeof(Digest), stream);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (sizes[i] == 0) continue;
    const std::size_t nbytes = sources[i].nbytes;
    device_.unpack.launch(packed(i), sizes[i], nbytes, proof(), {0, nbytes}, stream);
    device_.digest.launch(proof(), nbytes, chunk_bytes_, results() + i * sizeof(Digest), stream);
  }
  RA_TRY(device_.driver, MemcpyDtoHAsync, digests.data(), results(), digests.size() * sizeof(Digest), stream);
  RA_TRY(device_.driver, StreamSynchronize, stream);
  return digests;
}

std::vector<std::size_t> Packer::pack(const std::vector<Source>& sources, CUstream stream) {
  try {
    std::vector<std::size_t> sizes = try_all(sources, stream);
    bool any = false;
    for (const std::size_t size : sizes) any = any || size != 0;
    if (!any) return sizes;
    const std::vector<Digest> digests = unpack_all(sources, sizes, stream);
    // No content has a digest of zeros: where kernels do nothing, all have.
    for (std::size_t i = 0; i < sources.size(); ++i)
      if (digests[i] != sources[i].digest || digests[i] == Digest{}) sizes[i] = 0;
    return sizes;
  } catch (...) {
    device_.driver.StreamSynchronize(stream);  // kernels that still run use what the caller may give back
    throw;
  }
}

}  // namespace rotator

// Modules and kernels. Code is not run: a kernel that the simulator knows by name does here what it does on a GPU.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "csrc/digest.h"
#include "csrc/packing.h"
#include "sim/sim.h"

namespace sim {

constexpr const char* kDigestKernel = "rotator_digest";
constexpr const char* kCopyKernel = "rotator_copy";
constexpr const char* kPackKernel = "rotator_pack";
constexpr const char* kUnpackKernel = "rotator_unpack";
constexpr std::size_t kLoadBytes = 16;  // the kernel reads whole words of this size

// `.entry name(` with any white space between, as a compiler writes it.
static bool has_entry(const std::string& text, const std::string& name) {
  static constexpr const char* kSpace = " \t\r\n";
  for (std::size_t at = 0; (at = text.find(".entry", at)) != std::string::npos;) {
    at = text.find_first_not_of(kSpace, at + std::strlen(".entry"));
    if (at == std::string::npos) return false;
    const std::size_t end = text.find_first_of(" \t\r\n(", at);
    if (text.compare(at, end - at, name) == 0) return true;
  }
  return false;
}

struct DigestArguments {
  CUdeviceptr data;
  uint64_t nbytes;
  uint64_t chunk_bytes;
  CUdeviceptr out;
  uint64_t chunks() const { return (nbytes + chunk_bytes - 1) / chunk_bytes; }
};

// Arguments are copied when the kernel is launched, as the driver does.
static uint64_t argument(void** parameters, int number) {
  uint64_t value;
  std::memcpy(&value, parameters[number], sizeof value);
  return value;
}

static DigestArguments digest_arguments(void** parameters) {
  return {argument(parameters, 0), argument(parameters, 1), argument(parameters, 2), argument(parameters, 3)};
}

static CUresult run_digest(const DigestArguments& on) {
  if (!accessible(on.data, on.nbytes) || !accessible(on.out, on.chunks() * sizeof(rotator::Digest)))
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  const auto* data = reinterpret_cast<const unsigned char*>(on.data);
  auto* words = reinterpret_cast<uint64_t*>(on.out);
  for (uint64_t chunk = 0; chunk < on.chunks(); ++chunk) {
    const uint64_t at = chunk * on.chunk_bytes;
    const rotator::Digest digest = rotator::digest_of(data + at, std::min(on.chunk_bytes, on.nbytes - at));
    words[2 * chunk] += digest.words[0];
    words[2 * chunk + 1] += digest.words[1];
  }
  return CUDA_SUCCESS;
}

struct CopyArguments {
  CUdeviceptr to;
  CUdeviceptr from;  // in device memory, or in registered host memory
  uint64_t nbytes;
  bool from_host() const { return is_registered(reinterpret_cast<const void*>(from), nbytes); }
};

static CUresult run_copy(const CopyArguments& on) {
  if (on.to % kLoadBytes != 0 || on.from % kLoadBytes != 0) return CUDA_ERROR_MISALIGNED_ADDRESS;
  const bool readable = on.from_host() || accessible(on.from, on.nbytes);
  if (!readable || !accessible(on.to, on.nbytes)) return CUDA_ERROR_ILLEGAL_ADDRESS;
  std::memcpy(reinterpret_cast<void*>(on.to), reinterpret_cast<const void*>(on.from),
              on.nbytes / kLoadBytes * kLoadBytes);
  return CUDA_SUCCESS;
}

// Over the link it is as fast as the copy engine, and whatever that one still has to do does not matter to it.
static CUresult launch_copy(CUstream stream, void** parameters) {
  const CopyArguments on{argument(parameters, 0), argument(parameters, 1), argument(parameters, 2)};
  Op op;
  op.effect = [on] { return run_copy(on); };
  if (on.from_host()) {
    op.touches[0] = {on.to, on.nbytes};
    op.host = {on.from, on.nbytes};
    op.cost = link_time(on.nbytes);
    op.link = &sim().links[stream->device][kByKernel];
    op.wire = &sim().wires[stream->device];
  } else {
    op.touches = {Span{on.to, on.nbytes}, Span{on.from, on.nbytes}};
    op.cost = device_time(on.nbytes);
  }
  return enqueue(stream, std::move(op));
}

struct PackArguments {
  CUdeviceptr data;
  uint64_t nbytes;
  CUdeviceptr out;
  uint64_t limit;
  CUdeviceptr others_bytes;
};

static CUresult run_pack(const PackArguments& on) {
  if (on.data % kLoadBytes != 0 || on.out % rotator::kPackAlign != 0) return CUDA_ERROR_MISALIGNED_ADDRESS;
  const bool readable = accessible(on.data, on.nbytes) && accessible(on.out, on.limit);
  if (!readable || !accessible(on.others_bytes, sizeof(uint64_t))) return CUDA_ERROR_ILLEGAL_ADDRESS;
  const std::size_t packed = rotator::pack(reinterpret_cast<const unsigned char*>(on.data), on.nbytes,
                                           reinterpret_cast<unsigned char*>(on.out), on.limit);
  *reinterpret_cast<uint64_t*>(on.others_bytes) += packed - rotator::pack_fixed_bytes(on.nbytes);
  return CUDA_SUCCESS;
}

static CUresult launch_pack(CUstream stream, void** parameters) {
  const PackArguments on{argument(parameters, 0), argument(parameters, 1), argument(parameters, 2),
                         argument(parameters, 3), argument(parameters, 4)};
  SIM_CHECK(on.nbytes != 0 && rotator::pack_fixed_bytes(on.nbytes) <= on.limit, CUDA_ERROR_INVALID_VALUE);
  Op op;
  op.effect = [on] { return run_pack(on); };
  op.touches = {Span{on.data, on.nbytes}, Span{on.out, on.limit}};
  op.cost = device_time(on.nbytes);
  return enqueue(stream, std::move(op));
}

struct UnpackArguments {
  CUdeviceptr packed;  // in device memory, or in registered host memory
  uint64_t packed_nbytes;
  uint64_t nbytes;
  CUdeviceptr to;
  uint64_t begin;
  uint64_t end;
  bool from_host() const { return kernels_can_read(reinterpret_cast<const void*>(packed), packed_nbytes); }
};

static CUresult run_unpack(const UnpackArguments& on) {
  if (on.packed % kLoadBytes != 0 || on.to % kLoadBytes != 0) return CUDA_ERROR_MISALIGNED_ADDRESS;
  const bool readable = on.from_host() || accessible(on.packed, on.packed_nbytes);
  if (!readable || !accessible(on.to + on.begin, on.end - on.begin)) return CUDA_ERROR_ILLEGAL_ADDRESS;
  rotator::unpack(reinterpret_cast<const unsigned char*>(on.packed), on.packed_nbytes, on.nbytes,
                  reinterpret_cast<unsigned char*>(on.to), on.begin, on.end);
  return CUDA_SUCCESS;
}

// What is packed is all that crosses the link.
static CUresult launch_unpack(CUstream stream, void** parameters) {
  const UnpackArguments on{argument(parameters, 0), argument(parameters, 1), argument(parameters, 2),
                           argument(parameters, 3), argument(parameters, 4), argument(parameters, 5)};
  SIM_CHECK(on.begin < on.end && on.end <= on.nbytes, CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(rotator::pack_fixed_bytes(on.nbytes) <= on.packed_nbytes, CUDA_ERROR_INVALID_VALUE);
  Op op;
  op.effect = [on] { return run_unpack(on); };
  op.touches[0] = {on.to + on.begin, on.end - on.begin};
  if (on.from_host()) {
    op.host = {on.packed, on.packed_nbytes};
    op.cost = link_time(on.packed_nbytes * (on.end - on.begin) / on.nbytes);
    op.link = &sim().links[stream->device][kByKernel];
    op.wire = &sim().wires[stream->device];
  } else {
    op.touches[1] = {on.packed, on.packed_nbytes};
    op.cost = device_time(on.nbytes);
  }
  return enqueue(stream, std::move(op));
}

static CUresult launch_digest(CUstream stream, const DigestArguments& on) {
  SIM_CHECK(on.nbytes != 0 && on.chunk_bytes != 0, CUDA_ERROR_INVALID_VALUE);
  Op op;
  const bool aligned = on.data % kLoadBytes == 0 && on.chunk_bytes % kLoadBytes == 0 && on.out % 8 == 0;
  op.effect = [on, aligned] { return aligned ? run_digest(on) : CUDA_ERROR_MISALIGNED_ADDRESS; };
  op.touches = {Span{on.data, on.nbytes}, Span{on.out, on.chunks() * sizeof(rotator::Digest)}};
  op.cost = device_time(on.nbytes);
  return enqueue(stream, std::move(op));
}

}  // namespace sim

using namespace sim;

SIM_EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  SIM_CALL("cuModuleLoadData");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  SIM_CHECK(image != nullptr, CUDA_ERROR_INVALID_VALUE);
  const std::string text = static_cast<const char*>(image);
  SIM_CHECK(text.find(".version") != std::string::npos && text.find(".target") != std::string::npos,
            CUDA_ERROR_INVALID_IMAGE);
  *module = s.modules.emplace_back(new CUmod_st{current()->device, text}).get();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuModuleUnload(CUmodule module) {
  SIM_CALL("cuModuleUnload");
  for (auto it = s.modules.begin(); it != s.modules.end(); ++it) {
    if (it->get() != module) continue;
    s.functions.remove_if([module](const auto& function) { return function->module == module; });
    s.modules.erase(it);
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_HANDLE;
}

SIM_EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  SIM_CALL("cuModuleGetFunction");
  const auto known = std::find_if(s.modules.begin(), s.modules.end(), [&](auto& m) { return m.get() == module; });
  SIM_CHECK(known != s.modules.end(), CUDA_ERROR_INVALID_HANDLE);
  const auto is_name = [name](const char* kernel) { return std::strcmp(name, kernel) == 0; };
  const char* const kernels[] = {kDigestKernel, kCopyKernel, kPackKernel, kUnpackKernel};
  const bool simulated = std::any_of(std::begin(kernels), std::end(kernels), is_name);
  SIM_CHECK(simulated && has_entry(module->text, name), CUDA_ERROR_NOT_FOUND);
  *function = s.functions.emplace_back(new CUfunc_st{module, name}).get();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned, CUstream stream,
                                   void** parameters, void**) {
  SIM_CALL("cuLaunchKernel");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  const auto known = std::find_if(s.functions.begin(), s.functions.end(), [&](auto& f) { return f.get() == function; });
  stream = stream_or_default(stream);
  SIM_CHECK(known != s.functions.end() && stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  // Unlike copies, kernels go only into streams of the context that is current and that loaded their code.
  SIM_CHECK(stream->device == current()->device && function->module->device == stream->device,
            CUDA_ERROR_INVALID_HANDLE);
  SIM_CHECK(grid_x * grid_y * grid_z != 0 && block_x * block_y * block_z != 0 && block_x * block_y * block_z <= 1024,
            CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(parameters != nullptr, CUDA_ERROR_INVALID_VALUE);
  if (function->name == kCopyKernel) return launch_copy(stream, parameters);
  if (function->name == kPackKernel) return launch_pack(stream, parameters);
  if (function->name == kUnpackKernel) return launch_unpack(stream, parameters);
  return launch_digest(stream, digest_arguments(parameters));
}

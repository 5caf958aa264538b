#include "csrc/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "csrc/error.h"

namespace rotator {

void raise(int code, std::string message) {
  Error error;
  error.code = code;
  error.message = std::move(message);
  throw error;
}

void raise_driver(const Driver& driver, CUresult result, const char* call) {
  const char* name = nullptr;
  if (driver.GetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr) name = "unnamed error";
  Error error;
  error.code = result == CUDA_ERROR_OUT_OF_MEMORY ? RA_OUT_OF_MEMORY : RA_DRIVER_ERROR;
  error.driver_code = result;
  error.call = call;
  error.message = std::string("cu") + call + " answered " + name + " (" + std::to_string(result) + ")";
  throw error;
}

static const char* driver_path(const char* path) {
  if (path != nullptr && *path != '\0') return path;
  const char* named = std::getenv("ROTATOR_CUDA_DRIVER");
  return named != nullptr && *named != '\0' ? named : "libcuda.so.1";
}

template <typename Call>
static void resolve(void* library, const char* symbol, Call& call) {
  call = reinterpret_cast<Call>(dlsym(library, symbol));
}

Driver load_driver(const char* path) {
  const char* name = driver_path(path);
  // Never closed: a driver keeps threads of its own, and torch shares it.
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) raise(RA_DRIVER_MISSING, std::string("cannot load the CUDA driver: ") + dlerror());
  Driver driver;
#define RA_REQUIRED(member, symbol, parameters)                                                     \
  resolve(library, symbol, driver.member);                                                          \
  if (driver.member == nullptr) raise(RA_DRIVER_MISSING, std::string(name) + " lacks " + symbol);
#define RA_OPTIONAL(member, symbol, parameters) resolve(library, symbol, driver.member);
  RA_DRIVER_CALLS(RA_REQUIRED)
  RA_DRIVER_OPTIONAL_CALLS(RA_OPTIONAL)
#undef RA_REQUIRED
#undef RA_OPTIONAL
  // A driver without a device is no better than none.
  const CUresult initialized = driver.Init(0);
  if (initialized == CUDA_ERROR_NO_DEVICE) raise(RA_DRIVER_MISSING, std::string(name) + " finds no device");
  if (initialized != CUDA_SUCCESS) raise_driver(driver, initialized, "Init");
  return driver;
}

}  // namespace rotator

// One error type for everything below the C boundary, and the one macro that raises it from a driver call.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/api.h"
#include "csrc/driver.h"

namespace rotator {

struct Error {
  int code = RA_DRIVER_ERROR;
  std::string message;
  const char* call = "";
  CUresult driver_code = CUDA_SUCCESS;
  uint64_t bytes_wanted = 0;
  uint64_t bytes_free = 0;
};

[[noreturn]] void raise(int code, std::string message);
[[noreturn]] void raise_driver(const Driver& driver, CUresult result, const char* call);

}  // namespace rotator

// RA_TRY(driver, MemMap, address, ...): calls through the table and throws Error when the answer is not success.
#define RA_TRY(driver, member, ...)                                                       \
  do {                                                                                    \
    const CUresult ra_result_ = (driver).member(__VA_ARGS__);                             \
    if (ra_result_ != CUDA_SUCCESS) ::rotator::raise_driver(driver, ra_result_, #member); \
  } while (0)

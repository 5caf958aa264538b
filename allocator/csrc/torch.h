// What the C boundary needs to know of torch's side.
#pragma once

#include "csrc/api.h"

namespace rotator {

// torch's functions serve `allocator` no longer. A free that comes later is ignored: its memory went with the allocator.
void torch_unbind(ra_allocator* allocator);

}  // namespace rotator

// Descriptors that must not live on in a forked child: a lock or an unnamed file stays for as long as any process has
// it open, and a child may outlive its parent. (Across exec, O_CLOEXEC does this.)
#pragma once

namespace rotator {

void close_in_children(int fd);
// Before its owner closes it.
void forget_in_children(int fd);

}  // namespace rotator

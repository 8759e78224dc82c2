// Memory of packed weights: on huge pages where the system has them, because a decoding step reads all weights once and
// with small ones would spend a page walk per 4 KiB.
#pragma once

#include <cstdint>
#include <memory>

namespace quantbench {

// `size` bytes on a cache line, not initialized. Small weights share blocks, which live as long as any weight in them.
std::shared_ptr<void> weight_memory(int64_t size);

}  // namespace quantbench

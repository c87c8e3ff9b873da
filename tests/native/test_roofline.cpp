#include <atomic>
#include <cstring>

#include "check.h"
#include "cpu/roofline.h"
#include "dev/threads.h"
#include "support.h"

using check::for_each_usable_isa;
using pyeff::dev::Threads;

TEST(threads_cover_the_range_once) {
  for (int threads : {1, 2, 3, 8}) {
    Threads pool(threads);
    for (int64_t count : {0, 1, 2, 7, 100, 1001}) {
      std::vector<int> visits(count, 0);
      pyeff::for_each_task(pool.parallel(), count, [&](int64_t i) { ++visits[i]; });
      for (int64_t i = 0; i < count; ++i) CHECK(visits[i] == 1);
    }
  }
}

TEST(stream_copy_copies_and_no_more) {
  Threads pool(3);
  // Across one task (a megabyte) and two, from every side of a cache line.
  const int64_t sizes[] = {0, 1, 63, 64, 65, 1000, (1 << 20) + 65, (3 << 20) - 1};
  for_each_usable_isa([&](int isa) {
    for (int64_t size : sizes) {
      for (int64_t offset : {0, 1, 31, 63}) {
        std::vector<unsigned char> from(size + offset), to(size + offset + 64, 0xee);
        for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 131 + i / 251);
        PYEFF_ALL_OF(stream_copy).of[isa](to.data() + offset, from.data() + offset, size, pool.parallel());
        CHECK(size == 0 || std::memcmp(to.data() + offset, from.data() + offset, size) == 0);
        for (int64_t i = 0; i < offset; ++i) CHECK(to[i] == 0xee);
        for (size_t i = size + offset; i < to.size(); ++i) CHECK(to[i] == 0xee);
      }
    }
  });
}

TEST(stream_read_sees_every_byte) {
  Threads pool(3);
  const int64_t size = (2 << 20) + 77;
  std::vector<unsigned char> bytes(size, 0);
  for_each_usable_isa([&](int isa) {
    auto read = PYEFF_ALL_OF(stream_read).of[isa];
    for (int64_t at : {int64_t{0}, int64_t{8}, int64_t{1} << 20, size - 1, size - 77}) {
      bytes[at] = 1;
      CHECK(read(bytes.data(), size, pool.parallel()) != 0);
      bytes[at] = 0;
      CHECK(read(bytes.data(), size, pool.parallel()) == 0);
    }
  });
}

TEST(fma_loop_counts_what_all_threads_do) {
  Threads one(1), three(3);
  for_each_usable_isa([&](int isa) {
    auto loop = PYEFF_ALL_OF(fma_loop).of[isa];
    for (auto type : {pyeff::FmaType::kFloat64, pyeff::FmaType::kFloat32, pyeff::FmaType::kBFloat16}) {
      const double once = loop(type, 10, one.parallel());
      CHECK(once > 0);
      CHECK(loop(type, 20, three.parallel()) == 6 * once);
    }
  });
}

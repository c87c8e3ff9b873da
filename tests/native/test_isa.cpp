#include "check.h"
#include "cpu/isa.h"

TEST(each_set_contains_the_ones_before_it) {
  for (unsigned sets : {pyeff::isa_built(), pyeff::isa_detected()}) CHECK((sets & (sets + 1)) == 0 && (sets & 1u));
}

TEST(the_choice_is_built_and_in_the_processor) {
  CHECK(pyeff::isa_built() & pyeff::isa_detected() & (1u << pyeff::isa_chosen()));
}

#include "check.h"
#include "cpu/isa.h"

TEST(each_set_contains_the_ones_before_it) {
  // A build of some sets alone, as the sanitizers have, may leave out any.
  CHECK(pyeff::isa_built() != 0);
  CHECK((pyeff::isa_detected() & (pyeff::isa_detected() + 1)) == 0 && (pyeff::isa_detected() & 1u));
}

TEST(the_choice_is_built_and_in_the_processor) {
  CHECK(pyeff::isa_built() & pyeff::isa_detected() & (1u << pyeff::isa_chosen()));
}

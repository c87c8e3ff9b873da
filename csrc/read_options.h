// READ's options, as the kernels of every backend know them.
#pragma once

namespace pyeff {

enum class Cell : int { rnn, gru, lstm };
enum class Norm : int { rms, layer, none };
enum class Reduce : int { mean, last };

}  // namespace pyeff

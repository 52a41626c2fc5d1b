// The step over an e4m3 cache: the same code, compiled beside the other (in parallel), which it leaves as it is.
#define PEREGRINE_FP8_CACHE 1
#include "step.cu"

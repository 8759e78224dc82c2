// What happens between two decode steps without the host: the tokens just chosen become the next step's input.

// ids, positions, context [sequences], slots i64[sequences], tables [sequences, pages]; tokens: chosen by the last step.
// flag 0: the host has written this step's inputs, nothing is to be done. A padded sequence (context 0) stays as it is.
extern "C" __global__ void advance(const int* flag, const int* tokens, int* ids, int* positions, int* context,
                                   long long* slots, const int* tables, int sequences, int pages) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  int s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s >= sequences || *flag == 0 || context[s] == 0) return;
  int position = positions[s] + 1;
  ids[s] = tokens[s];
  positions[s] = position;
  context[s] = position + 1;
  slots[s] = (long long)tables[s * pages + position / 64] * 64 + position % 64;
}

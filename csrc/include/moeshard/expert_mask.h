/* Expert masks for programs that use llama.cpp's C API with the llama.cpp inside libmoeshard. */
#ifndef MOESHARD_EXPERT_MASK_H
#define MOESHARD_EXPERT_MASK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

/* From the next llama_decode on, tokens of sequence `seq_id` are routed to kept experts only (seq_id < 0: all sequences
 * without a mask of their own). `keep` holds n_layer * n_expert bytes, row-major, zero drops the expert; n_layer counts
 * every block of the model and rows of blocks without a router carry no meaning. NULL clears the mask.
 *
 * Masks may be set, changed and cleared between decodes; only the first one of a context rebuilds its graph. They go
 * away with the context. A token that is in several sequences follows the mask of the first.
 *
 * Returns 0, or -1 and changes nothing where the mask does not fit the model: another shape, or fewer kept experts in
 * some layer than each token uses. llama_expert_mask_error() then says which. */
int32_t llama_context_set_expert_mask(struct llama_context* ctx, int32_t seq_id, const uint8_t* keep, int32_t n_layer,
                                      int32_t n_expert);

/* What the last failed call of this thread said; "" before one. Valid until the next call. */
const char* llama_expert_mask_error(void);

#ifdef __cplusplus
}
#endif

#endif

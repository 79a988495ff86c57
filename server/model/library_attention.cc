#include "server/model/library_attention.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <atomic>
#include <tuple>

#include "server/model/torch_guard.h"

namespace vsprefill::model {
namespace {

at::Tensor View(const void* data, at::IntArrayRef shape, at::IntArrayRef strides) {
  return at::from_blob(const_cast<void*>(data), shape, strides,
                       at::TensorOptions(at::kBFloat16).device(c10::Device(c10::kCUDA)));
}

// cuDNN is the fastest on Hopper, but is not there on every system and shape; the first refusal
// turns it off. It aligns the causal mask with the first key, so it serves whole prompts only.
bool TryCudnn(const kernels::AttentionShape& shape, const kernels::AttentionSequence& sequence,
              const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor* out) {
  static std::atomic<bool> usable{true};
  if (sequence.q_tokens != sequence.kv_tokens || !usable.load(std::memory_order_relaxed)) {
    return false;
  }
  try {
    *out = std::get<0>(at::_scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), /*attn_bias=*/{},
        /*compute_log_sumexp=*/false, /*dropout_p=*/0.0, /*is_causal=*/true,
        /*return_debug_mask=*/false, shape.scale));
    *out = out->transpose(1, 2);
    return true;
  } catch (const c10::Error&) {
    usable.store(false, std::memory_order_relaxed);
    return false;
  }
}

}  // namespace

absl::Status LibraryAttention(const kernels::AttentionShape& shape,
                              absl::Span<const kernels::AttentionSequence> sequences) {
  return TorchGuard("library attention", [&] {
    const c10::InferenceMode inference;
    for (const kernels::AttentionSequence& sequence : sequences) {
      // [1, tokens, heads, head_dim], as FlashAttention wants it.
      const at::Tensor q =
          View(sequence.q, {1, sequence.q_tokens, shape.num_q_heads, shape.head_dim},
               {sequence.q_tokens * sequence.q_token_stride, sequence.q_token_stride,
                sequence.q_head_stride, 1});
      const auto keys = [&](const void* data) {
        return View(data, {1, sequence.kv_tokens, shape.num_kv_heads, shape.head_dim},
                    {shape.num_kv_heads * sequence.kv_head_stride, sequence.kv_token_stride,
                     sequence.kv_head_stride, 1});
      };
      const at::Tensor k = keys(sequence.k);
      const at::Tensor v = keys(sequence.v);
      at::Tensor result;
      if (!TryCudnn(shape, sequence, q, k, v, &result)) {
        // FlashAttention 2 aligns the causal mask with the last key: right for chunks too.
        result = std::get<0>(at::_flash_attention_forward(
            q, k, v, /*cum_seq_q=*/{}, /*cum_seq_k=*/{}, sequence.q_tokens, sequence.kv_tokens,
            /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false, shape.scale));
      }
      at::Tensor out = View(sequence.out, {1, sequence.q_tokens, shape.num_q_heads, shape.head_dim},
                            {sequence.q_tokens * sequence.out_token_stride,
                             sequence.out_token_stride, sequence.out_head_stride, 1});
      out.copy_(result);
    }
    return absl::OkStatus();
  });
}

}  // namespace vsprefill::model

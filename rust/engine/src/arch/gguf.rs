//! A family's sizes from a GGUF file's metadata.

use super::families::{FAMILIES, Family, NORMALISED};
use super::rope::{Yarn, base_frequencies, longrope_factor, yarn_factor};
use super::{
    Arch, Block, ExpertArch, Groups, LatentArch, LayerArch, MAX_LAYERS, MAX_WIDTH, Names, Rope,
    unknown,
};
use crate::error::Result;
use crate::weights::{Value, Weights};

pub(super) fn from_gguf(w: &Weights) -> Result<Arch> {
    let name = w
        .get_str("general.architecture")?
        .ok_or_else(|| w.missing_key("general.architecture"))?;
    let family = FAMILIES
        .iter()
        .find(|f| f.gguf == Some(name))
        .ok_or_else(|| unknown("architecture", name, FAMILIES.iter().filter_map(|f| f.gguf)))?;
    let key = |k: &str| format!("{name}.{k}");
    let size = |k: &str| w.get_usize(&key(k));
    let need = |k: &str| size(k)?.ok_or_else(|| w.missing_key(&key(k)));
    let hidden_size = need("embedding_length")?;
    let heads = need("attention.head_count")?;
    let head_dim = match size("attention.key_length")? {
        Some(n) => n,
        None if heads > 0 => hidden_size / heads,
        None => 0,
    };
    let value_dim = size("attention.value_length")?.unwrap_or(head_dim);
    if value_dim != head_dim && !family.latent {
        return Err(w.problem(format!(
            "keys of {head_dim} and values of {value_dim} numbers per head"
        )));
    }
    let guessing_layers = size("nextn_predict_layers")?.unwrap_or(0);
    let layers = need("block_count")?.saturating_sub(guessing_layers);
    let layers = layers.min(MAX_LAYERS + 1);
    let kv_heads = gguf_kv_heads(w, &key("attention.head_count_kv"), heads)?;
    let context_size = need("context_length")?;
    let scaling = gguf_scaling(w, name)?;
    let dim = size("rope.dimension_count")?
        .unwrap_or(head_dim)
        .min(2 * MAX_WIDTH);
    let base = w.get_f32(&key("rope.freq_base"))?.unwrap_or(family.theta);
    let mut global = Rope::new(base_frequencies(base, dim));
    gguf_scale(w, family, &scaling, base, &mut global)?;
    let mut ropes = vec![global];
    if let Some(of) = family.local_rope {
        let own = w.get_f32(&key("rope.freq_base_swa"))?.or(of);
        ropes.push(Rope::new(base_frequencies(own.unwrap_or(base), dim)));
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let norm_eps = match w.get_f32(&key("attention.layer_norm_epsilon"))? {
        Some(eps) => eps,
        None => w.get_f32(&eps)?.ok_or_else(|| w.missing_key(&eps))?,
    };
    let vocab_size = match size("vocab_size")? {
        Some(n) => n,
        None => w.require("token_embd.weight")?.rows(),
    };
    let experts = gguf_experts(w, family, name, layers)?;
    let dense_layers = size("leading_dense_block_count")?.unwrap_or(0);
    let windows = gguf_windows(w, family, name)?;
    let logit_scale = w.get_f32(&key("logit_scale"))?.filter(|&x| x != 0.0);
    let parallel = w.get_bool(&key("use_parallel_residual"))?.unwrap_or(false);
    let interval = size("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let layer = |i: usize| LayerArch {
        experts: experts.is_some() && i >= dense_layers && (i + 1).is_multiple_of(interval),
        convolution: family.convolution && kv_heads.get(i) == Some(&0),
        ..windows.layer(family, i)
    };
    let latent = gguf_latent(w, family, name, dim, norm_eps)?;
    let scale = match (
        w.get_f32(&key("attention.scale"))?.filter(|&x| x > 0.0),
        &latent,
    ) {
        (Some(scale), _) => scale,
        (None, Some(latent)) => {
            let length = (latent.plain + latent.rotated) as f32;
            scaling.growth().powi(2) / length.sqrt()
        }
        (None, None) => gguf_attention_scale(family, layers, hidden_size, heads, head_dim),
    };
    let mut arch = Arch {
        vocab_size,
        hidden_size,
        intermediate_size: match &experts {
            Some(e) => size("feed_forward_length")?.unwrap_or(e.intermediate_size),
            None => need("feed_forward_length")?,
        },
        heads,
        kv_heads: match latent {
            Some(_) => 1,
            None => kv_heads.iter().copied().max().unwrap_or(heads),
        },
        head_dim: latent.map_or(head_dim, |l| l.rank.saturating_add(l.rotated)),
        context_size,
        norm_eps,
        norm_offset: 0.0,
        qkv_limit: w.get_f32(&key("attention.clamp_kqv"))?.filter(|&x| x > 0.0),
        latent,
        convolution: size("shortconv.l_cache")?,
        guessing_layers,
        embedding_scale: w.get_f32(&key("embedding_scale"))?.unwrap_or(1.0),
        residual_scale: w.get_f32(&key("residual_scale"))?.unwrap_or(1.0),
        logit_scale: match (logit_scale, family.divided_logits) {
            (Some(by), true) => 1.0 / by,
            (by, _) => by.unwrap_or(1.0),
        },
        attention_scale: scale,
        attention_softcap: w
            .get_f32(&key("attn_logit_softcapping"))?
            .filter(|&x| x > 0.0),
        logit_softcap: w
            .get_f32(&key("final_logit_softcapping"))?
            .filter(|&x| x > 0.0),
        tied: w.tensor("output.weight").is_none(),
        pairing: family.gguf_pairing,
        ropes,
        layers: (0..layers).map(layer).collect(),
        original_context: scaling.original_context,
        experts,
        names: Names::Gguf,
        ..family.arch()
    };
    arch.qk_norm |= w.tensor("blk.0.attn_q_norm.weight").is_some();
    arch.transposed = false;
    if parallel {
        arch.block = Block::Parallel;
    }
    if family.scaled_embedding {
        arch.embedding_scale = (hidden_size as f32).sqrt();
    }
    Ok(arch)
}

/// Heads of keys and values: of all layers, or of each, where 0 means that it has no attention.
fn gguf_kv_heads(w: &Weights, key: &str, heads: usize) -> Result<Vec<usize>> {
    let Some(Value::Ints(_)) = w.metadata.get(key) else {
        return Ok(vec![w.get_usize(key)?.unwrap_or(heads)]);
    };
    let all = w.get_ints(key)?.unwrap_or_default();
    let all: Vec<_> = all
        .iter()
        .map(|&n| usize::try_from(n).unwrap_or(usize::MAX))
        .collect();
    let mut with = all.iter().filter(|&&n| n > 0);
    let first = with.next();
    match with.find(|n| Some(*n) != first) {
        None => Ok(all),
        Some(other) => Err(w.problem(format!(
            "layers with {} and with {other} key and value heads",
            first.copied().unwrap_or_default()
        ))),
    }
}

fn gguf_latent(
    w: &Weights,
    family: &Family,
    name: &str,
    rotated: usize,
    eps: f32,
) -> Result<Option<LatentArch>> {
    if !family.latent {
        return Ok(None);
    }
    let size = |k: &str| w.get_usize(&format!("{name}.attention.{k}"));
    // Files whose cache is made for latents say their sizes first, the model's beside them.
    let either = |a: &str, b: &str| match size(a)? {
        Some(n) => Ok(n),
        None => size(b)?.ok_or_else(|| w.missing_key(&format!("{name}.attention.{b}"))),
    };
    let key = either("key_length_mla", "key_length")?;
    Ok(Some(LatentArch {
        query_rank: size("q_lora_rank")?.filter(|&n| n > 0),
        rank: either("kv_lora_rank", "kv_lora_rank")?,
        plain: key.saturating_sub(rotated),
        rotated,
        value: either("value_length_mla", "value_length")?,
        eps,
    }))
}

fn gguf_experts(
    w: &Weights,
    family: &Family,
    name: &str,
    layers: usize,
) -> Result<Option<ExpertArch>> {
    let key = |k: &str| format!("{name}.{k}");
    let size = |k: &str| w.get_usize(&key(k));
    let Some(count) = size("expert_count")?.filter(|&n| n > 0) else {
        return Ok(None);
    };
    let need = |k: &str| size(k)?.ok_or_else(|| w.missing_key(&key(k)));
    let routing = family.experts.unwrap_or(NORMALISED);
    // Converters have written other sizes of shared experts than theirs.
    let shared = |i: usize| w.tensor(&format!("blk.{i}.ffn_up_shexp.weight"));
    let shared = (0..layers).find_map(shared).map(|t| t.rows());
    let groups = match (
        size("expert_group_count")?,
        size("expert_group_used_count")?,
    ) {
        (Some(count), Some(used)) if count > 1 => Some(Groups { count, used }),
        _ => None,
    };
    Ok(Some(ExpertArch {
        count,
        used: need("expert_used_count")?,
        intermediate_size: match size("expert_feed_forward_length")? {
            Some(n) => n,
            None => need("feed_forward_length")?,
        },
        shared_size: match shared {
            Some(rows) => Some(rows),
            None => size("expert_shared_feed_forward_length")?.filter(|&n| n > 0),
        },
        normalised: w
            .get_bool(&key("expert_weights_norm"))?
            .unwrap_or(routing.normalised),
        sigmoid: match size("expert_gating_func")? {
            None | Some(0) => routing.sigmoid,
            Some(1) => false,
            Some(2) => true,
            Some(other) => {
                return Err(w.problem(format!(
                    "experts are chosen by function 1 (softmax) or 2 (sigmoid), got {other}"
                )));
            }
        },
        groups,
        scale: w
            .get_f32(&key("expert_weights_scale"))?
            .filter(|&x| x != 0.0)
            .unwrap_or(1.0),
    }))
}

/// Which layers of a GGUF model have a window.
struct Windows {
    window: Option<usize>,
    interval: Option<usize>,
    listed: Option<Vec<bool>>,
}

fn gguf_windows(w: &Weights, family: &Family, name: &str) -> Result<Windows> {
    let window = w.get_usize(&format!("{name}.attention.sliding_window"))?;
    let key = format!("{name}.attention.sliding_window_pattern");
    let (mut interval, mut listed) = (family.window_interval, None);
    match w.metadata.get(&key) {
        Some(Value::Bools(_)) => listed = w.get_bools(&key)?.map(<[bool]>::to_vec),
        Some(_) => interval = w.get_usize(&key)?.filter(|&n| n > 0),
        None => {}
    }
    let window = window.filter(|&n| n > 0);
    Ok(Windows {
        window,
        interval,
        listed,
    })
}

impl Windows {
    /// The traits of layer `i`: with an interval n, layers n-1, 2n-1, ... see everything.
    fn layer(&self, family: &Family, i: usize) -> LayerArch {
        let nope = family
            .nope_interval
            .is_some_and(|n| (i + 1).is_multiple_of(n));
        let windowed = match (&self.listed, self.interval) {
            (Some(listed), _) => listed.get(i).copied().unwrap_or(false),
            (None, Some(n)) => !(i + 1).is_multiple_of(n),
            (None, None) => true,
        };
        let window = self.window.filter(|_| windowed);
        let local = usize::from(window.is_some() && family.local_rope.is_some());
        let nope = nope || (family.global_nope && self.window.is_some() && !windowed);
        let nope = nope || family.learned_positions;
        LayerArch {
            rope: (!nope).then_some(local),
            window,
            experts: false,
            convolution: false,
        }
    }
}

/// GGUF files do not say `query_pre_attn_scalar`: it is the head size, but for gemma's largest models.
fn gguf_attention_scale(
    family: &Family,
    layers: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
) -> f32 {
    let width = if family.wide_queries == Some(layers) && heads > 0 {
        hidden / heads
    } else {
        head_dim
    };
    1.0 / (width as f32).sqrt()
}

struct GgufScaling {
    kind: String,
    factor: f32,
    attention_factor: Option<f32>,
    original_context: Option<usize>,
    /// Of what scores grow by with the logarithm of the factor: then the angles' own factor is 1 (deepseek).
    log_multiplier: Option<f32>,
}

impl GgufScaling {
    /// What queries and keys are multiplied by.
    fn growth(&self) -> f32 {
        match self.log_multiplier.filter(|_| self.factor > 1.0) {
            Some(by) => 1.0 + by * self.factor.ln(),
            None => 1.0,
        }
    }
}

fn gguf_scaling(w: &Weights, name: &str) -> Result<GgufScaling> {
    let key = |k: &str| format!("{name}.rope.scaling.{k}");
    Ok(GgufScaling {
        kind: w.get_str(&key("type"))?.unwrap_or("none").to_string(),
        factor: w.get_f32(&key("factor"))?.unwrap_or(1.0),
        attention_factor: w.get_f32(&key("attn_factor"))?,
        original_context: w.get_usize(&key("original_context_length"))?,
        log_multiplier: w.get_f32(&key("yarn_log_multiplier"))?,
    })
}

fn gguf_scale(
    w: &Weights,
    family: &Family,
    scaling: &GgufScaling,
    base: f32,
    rope: &mut Rope,
) -> Result<()> {
    let name = family.name();
    let factors = |tensor: &str| -> Result<Option<Vec<f32>>> {
        let Some(t) = w.tensor(tensor) else {
            return Ok(None);
        };
        if t.elements() != rope.frequencies.len() {
            let (got, want) = (t.elements(), rope.frequencies.len());
            return Err(w.problem(format!(
                "tensor {tensor:?} has {got} numbers, wanted {want}"
            )));
        }
        Ok(Some(t.dequantize()))
    };
    let divided = |by: &[f32]| {
        rope.frequencies
            .iter()
            .zip(by)
            .map(|(f, by)| f / by)
            .collect::<Vec<_>>()
    };
    if let (Some(long), Some(short)) = (
        factors("rope_factors_long.weight")?,
        factors("rope_factors_short.weight")?,
    ) {
        let context = w.get_usize(&format!("{name}.context_length"))?.unwrap_or(0);
        let original = scaling.original_context.unwrap_or(context).max(1);
        rope.factor = scaling
            .attention_factor
            .unwrap_or_else(|| longrope_factor(context, original));
        (rope.long_frequencies, rope.frequencies) = (Some(divided(&long)), divided(&short));
        return Ok(());
    }
    if let Some(by) = factors("rope_freqs.weight")? {
        rope.frequencies = divided(&by);
        return Ok(());
    }
    match scaling.kind.as_str() {
        "none" => {}
        "linear" if scaling.factor > 0.0 => {
            rope.frequencies
                .iter_mut()
                .for_each(|f| *f /= scaling.factor);
        }
        "yarn" if scaling.factor > 0.0 => {
            let beta = |k: &str| w.get_f32(&format!("{name}.rope.scaling.{k}"));
            let context = w.get_usize(&format!("{name}.context_length"))?.unwrap_or(0);
            let yarn = Yarn {
                factor: scaling.factor,
                original: scaling.original_context.unwrap_or(context) as f32,
                fast: beta("yarn_beta_fast")?.unwrap_or(32.0),
                slow: beta("yarn_beta_slow")?.unwrap_or(1.0),
                truncate: family.rounded_yarn,
            };
            yarn.scale(base, &mut rope.frequencies);
            let own = scaling.attention_factor.unwrap_or(1.0);
            rope.factor = match scaling.log_multiplier {
                Some(_) => own,
                None => own * yarn_factor(scaling.factor, 1.0),
            };
        }
        // Without its factor tensors there is nothing to scale by.
        "longrope" => {}
        other => {
            return Err(unknown(
                "rope scaling",
                other,
                ["none", "linear", "longrope", "yarn"].into_iter(),
            ));
        }
    }
    Ok(())
}

//! A family's sizes from transformers' config.json.

use hfcore_kernels::elementwise::{Activation, Pairing, SWISH_ALPHA, SWISH_LIMIT};
use serde_json::Value as Json;

use super::families::{FAMILIES, Family};
use super::rope::{Yarn, base_frequencies, llama3_frequency, longrope_factor, yarn_factor};
use super::{
    Arch, Block, ExpertArch, Groups, Growth, LatentArch, LayerArch, MAX_LAYERS, MAX_WIDTH, Names,
    Rope, XIELU, unknown,
};
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Values of a `config.json`, with errors that name the key.
struct Config<'a> {
    weights: &'a Weights,
    json: &'a Json,
}

impl Config<'_> {
    fn get(&self, key: &str) -> Option<&Json> {
        self.json.get(key).filter(|v| !v.is_null())
    }
    fn wrong(&self, key: &str, wanted: &str, got: &Json) -> Error {
        let got: String = got.to_string().chars().take(60).collect();
        self.weights.problem(format!(
            "config.json: {key:?} should be {wanted}, got {got}"
        ))
    }
    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        // A list of a number for each layer, where they are all the same.
        let one = match v.as_array().map(Vec::as_slice) {
            Some([first, rest @ ..]) if rest.iter().all(|x| x == first) => first,
            _ => v,
        };
        let n = one
            .as_u64()
            .ok_or_else(|| self.wrong(key, "a whole number", v))?;
        Ok(Some(usize::try_from(n).unwrap_or(usize::MAX)))
    }
    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| self.weights.problem(format!("config.json has no {key:?}")))
    }
    /// The first of these keys that there is.
    fn either(&self, keys: &[&str]) -> Result<Option<usize>> {
        for key in keys {
            if let Some(n) = self.size(key)? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }
    /// One of these keys must be there; the first is what it should be called.
    fn need_either(&self, keys: &[&str]) -> Result<usize> {
        match self.either(keys)? {
            Some(n) => Ok(n),
            None => self.need(keys.first().copied().unwrap_or_default()),
        }
    }
    fn float(&self, key: &str) -> Result<Option<f32>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        let x = v.as_f64().filter(|x| x.is_finite());
        Ok(Some(
            x.ok_or_else(|| self.wrong(key, "a finite number", v))? as f32,
        ))
    }
    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        Ok(Some(
            v.as_bool()
                .ok_or_else(|| self.wrong(key, "true or false", v))?,
        ))
    }
    fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        let wrong = || self.wrong(key, "a list of finite numbers", v);
        let list = v.as_array().ok_or_else(wrong)?;
        list.iter()
            .map(|x| {
                x.as_f64()
                    .filter(|x| x.is_finite())
                    .map(|x| x as f32)
                    .ok_or_else(wrong)
            })
            .collect::<Result<_>>()
            .map(Some)
    }
    fn str(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Json::as_str)
    }
    fn of<'b>(&'b self, json: &'b Json) -> Config<'b> {
        Config {
            weights: self.weights,
            json,
        }
    }
}

pub(super) fn from_config(weights: &Weights, json: &Json) -> Result<Arch> {
    let c = Config { weights, json };
    let name = c
        .str("model_type")
        .ok_or_else(|| weights.problem("config.json has no \"model_type\""))?;
    let known = || FAMILIES.iter().flat_map(|f| f.hf.iter().copied());
    let family = FAMILIES
        .iter()
        .find(|f| f.hf.contains(&name))
        .ok_or_else(|| unknown("architecture", name, known()))?;
    let hidden_size = c.need_either(&["hidden_size", "n_embd"])?;
    let heads = c.need_either(&["num_attention_heads", "n_head"])?;
    let latent = config_latent(&c, family)?;
    let head_dim = match (latent, c.size("head_dim")?) {
        (Some(latent), _) => latent.rotated,
        (None, Some(n)) => n,
        (None, None) if heads > 0 => hidden_size / heads,
        (None, None) => 0,
    };
    let layers = c.need_either(&["num_hidden_layers", "n_layer"])?;
    let context_size = c.need_either(&["max_position_embeddings", "n_positions"])?;
    let length = latent.map_or(head_dim, |l| l.plain.saturating_add(l.rotated));
    let scalar = c.float("query_pre_attn_scalar")?.unwrap_or(length as f32);
    let (ropes, original_context) =
        config_ropes(&c, family, head_dim.min(MAX_WIDTH), context_size)?;
    let names = |bare| Names::Transformers {
        layers: family.hf_layers,
        own: family.hf_names,
        bare,
    };
    let mut arch = Arch {
        vocab_size: c.need("vocab_size")?,
        hidden_size,
        intermediate_size: config_width(&c, family, hidden_size)?,
        heads,
        kv_heads: match latent {
            Some(_) => 1,
            None => c.size("num_key_value_heads")?.unwrap_or(heads),
        },
        head_dim: latent.map_or(head_dim, |l| l.rank.saturating_add(l.rotated)),
        context_size,
        qkv_limit: c.float("clip_qkv")?.filter(|&x| x > 0.0),
        latent,
        convolution: c.size("conv_L_cache")?,
        guessing_layers: c
            .either(&["num_nextn_predict_layers", "num_mtp_layers"])?
            .unwrap_or(0),
        norm_eps: config_eps(&c, family)?,
        activation: config_activation(&c, family)?,
        embedding_scale: match family.scaled_embedding {
            true => (hidden_size as f32).sqrt(),
            false => c.float("embedding_multiplier")?.unwrap_or(1.0),
        },
        residual_scale: c.float("residual_multiplier")?.unwrap_or(1.0),
        logit_scale: c.float("logit_scale")?.unwrap_or(1.0)
            / c.float("logits_scaling")?.unwrap_or(1.0),
        attention_scale: match c.float("attention_multiplier")? {
            Some(scale) => scale,
            None => config_growth(&c, &latent)?.powi(2) / scalar.sqrt(),
        },
        attention_softcap: c.float("attn_logit_softcapping")?,
        logit_softcap: c.float("final_logit_softcapping")?,
        experts: config_experts(&c, family)?,
        tied: match c.bool("tie_embedding")? {
            Some(tied) => tied,
            None => c.bool("tie_word_embeddings")?.unwrap_or(family.tied),
        },
        ropes,
        layers: (0..layers.min(MAX_LAYERS + 1))
            .map(|i| config_layer(&c, family, i))
            .collect::<Result<_>>()?,
        both_ways: both_ways(&c),
        original_context,
        names: names(false),
        ..family.arch()
    };
    arch.qkv_bias |= c.bool("attention_bias")?.unwrap_or(false);
    for key in ["use_qk_norm", "qk_layernorm"] {
        arch.qk_norm |= c.bool(key)?.unwrap_or(false);
    }
    if latent.is_some() && c.bool("rope_interleave")? == Some(false) {
        arch.pairing = Pairing::Halves;
    }
    if c.bool("use_parallel_residual")?.unwrap_or(false) {
        arch.block = Block::Parallel;
    }
    let embedding = "token_embd.weight";
    if weights.tensor(&arch.tensor_name(None, embedding)).is_none() {
        arch.names = names(true);
        if weights.tensor(&arch.tensor_name(None, embedding)).is_none() {
            arch.names = names(false);
        }
    }
    Ok(arch)
}

fn both_ways(c: &Config) -> bool {
    let value = c.get("use_bidirectional_attention");
    value.and_then(Json::as_bool).unwrap_or(false)
}

fn config_eps(c: &Config, family: &Family) -> Result<f32> {
    for key in [
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ] {
        if let Some(eps) = c.float(key)? {
            return Ok(eps);
        }
    }
    Ok(if family.layer_norm { 1e-5 } else { 1e-6 })
}

fn config_latent(c: &Config, family: &Family) -> Result<Option<LatentArch>> {
    if !family.latent {
        return Ok(None);
    }
    Ok(Some(LatentArch {
        query_rank: c.size("q_lora_rank")?,
        rank: c.need("kv_lora_rank")?,
        plain: c.need("qk_nope_head_dim")?,
        rotated: c.need("qk_rope_head_dim")?,
        value: c.need("v_head_dim")?,
        // Whatever the model's other norms have.
        eps: 1e-6,
    }))
}

/// What queries and keys of latents are multiplied by, where the rope is scaled.
fn config_growth(c: &Config, latent: &Option<LatentArch>) -> Result<f32> {
    let scaling = c.get("rope_parameters").or_else(|| c.get("rope_scaling"));
    let Some(scaling) = scaling.filter(|_| latent.is_some()) else {
        return Ok(1.0);
    };
    let s = c.of(scaling);
    let kind = s.str("rope_type").or_else(|| s.str("type"));
    let all = s.float("mscale_all_dim")?.filter(|x| *x != 0.0);
    match (kind, all, s.float("factor")?) {
        (None | Some("default"), ..) | (_, None, _) | (.., None) => Ok(1.0),
        (_, Some(all), Some(factor)) => Ok(yarn_factor(factor, all)),
    }
}

/// How wide feed-forwards are.
fn config_width(c: &Config, family: &Family, hidden_size: usize) -> Result<usize> {
    let width = match c.either(&["block_ff_dim", "intermediate_size", "n_inner"])? {
        None if family.hf_transposed => hidden_size.saturating_mul(4),
        Some(n) => n,
        None => c.need("intermediate_size")?,
    };
    let plain = family.experts.is_none();
    let adjusted = c.bool("block_auto_adjust_ff_dim")?.unwrap_or(true);
    if !(family.convolution && plain && adjusted) {
        return Ok(width);
    }
    // lfm2: two thirds of it, times a factor, in whole multiples.
    let width = width.min(MAX_WIDTH) * 2 / 3;
    let by = c.float("block_ffn_dim_multiplier")?.unwrap_or(1.0);
    let width = (f64::from(by) * width as f64) as usize;
    let multiple = c.size("block_multiple_of")?.unwrap_or(256);
    Ok(width.div_ceil(multiple.max(1)).saturating_mul(multiple))
}

fn config_experts(c: &Config, family: &Family) -> Result<Option<ExpertArch>> {
    let Some(routing) = family.experts else {
        return Ok(None);
    };
    let width = match routing.plain_width {
        true => c.need("intermediate_size")?,
        false => c.need_either(&["moe_intermediate_size", "intermediate_size"])?,
    };
    let shared = [
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ];
    let several = c.either(&["n_shared_experts", "moe_num_shared_experts"])?;
    let several = several.map(|n| n.saturating_mul(width));
    let one = routing.shared.then_some(width);
    let grouped = routing.sigmoid || c.str("topk_method") == Some("group_limited_greedy");
    let groups = c.size("n_group")?.filter(|&n| grouped && n > 1);
    Ok(Some(ExpertArch {
        count: c.need_either(&[
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ])?,
        used: c.need_either(&[
            "num_experts_per_tok",
            "experts_per_token",
            "moe_topk",
            "moe_k",
        ])?,
        intermediate_size: width,
        shared_size: c.either(&shared)?.or(several).or(one).filter(|&n| n > 0),
        normalised: c.bool("norm_topk_prob")?.unwrap_or(routing.normalised),
        sigmoid: routing.sigmoid,
        groups: match groups {
            Some(count) => Some(Groups {
                count,
                used: c.size("topk_group")?.unwrap_or(count),
            }),
            None => None,
        },
        scale: c.float("routed_scaling_factor")?.unwrap_or(1.0),
    }))
}

/// Whether layer `i` has experts: all but the first ones, those that are listed, or every n-th.
fn config_sparse(c: &Config, family: &Family, i: usize) -> Result<bool> {
    let dense = |l: &Json| {
        l.as_array()
            .is_some_and(|l| l.iter().any(|n| n.as_u64() == Some(i as u64)))
    };
    let types = c.get("mlp_layer_types").and_then(|l| l.get(i));
    if let Some(kind) = types.and_then(Json::as_str) {
        return Ok(family.experts.is_some() && kind == "sparse");
    }
    let steps = ["decoder_sparse_step", "moe_layer_interval"];
    let step = c.either(&steps)?.unwrap_or(1).max(1);
    let firsts = [
        "first_k_dense_replace",
        "num_dense_layers",
        "moe_layer_start_index",
    ];
    let first = c.either(&firsts)?.unwrap_or(0);
    // Minus one is the last layer, as none is.
    let last = c.get("moe_layer_end_index").and_then(Json::as_u64);
    let outside = i < first || last.is_some_and(|last| i as u64 > last);
    let listed = c.get("mlp_only_layers").is_some_and(dense);
    Ok(family.experts.is_some() && !listed && !outside && (i + 1).is_multiple_of(step))
}

fn config_activation(c: &Config, family: &Family) -> Result<Activation> {
    if family.activation == Activation::ClampedSwish {
        for (key, wanted) in [("swiglu_limit", SWISH_LIMIT), ("swiglu_alpha", SWISH_ALPHA)] {
            if let Some(got) = c.float(key)?.filter(|x| *x != wanted) {
                return Err(c
                    .weights
                    .problem(format!("{key:?} must be {wanted}, got {got}")));
            }
        }
        return Ok(family.activation);
    }
    let keys = ["hidden_activation", "hidden_act", "activation_function"];
    match keys.iter().find_map(|key| c.str(key)) {
        None => Ok(family.activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("relu") => Ok(Activation::Relu),
        Some("relu2") => Ok(Activation::ReluSquared),
        Some("xielu") => Ok(XIELU),
        Some(other) => Err(unknown(
            "activation",
            other,
            [
                "silu",
                "gelu",
                "gelu_pytorch_tanh",
                "relu",
                "relu2",
                "xielu",
            ]
            .into_iter(),
        )),
    }
}

/// A layer's window and rope, from `layer_types` (transformers 5) or the older keys.
fn config_layer(c: &Config, family: &Family, i: usize) -> Result<LayerArch> {
    let window = c.size("sliding_window")?.filter(|&n| n > 0);
    // Both ways, half of it lies before a token.
    let window = window.map(|n| if both_ways(c) { n / 2 + 1 } else { n });
    let local_rope = usize::from(family.local_rope.is_some());
    let nope = c
        .get("no_rope_layers")
        .and_then(|l| l.get(i))
        .and_then(Json::as_u64)
        .map(|n| n == 0);
    let interval = c
        .size("no_rope_layer_interval")?
        .or(family.nope_interval)
        .filter(|&n| n > 0);
    let nope = nope.unwrap_or_else(|| interval.is_some_and(|n| (i + 1).is_multiple_of(n)));
    let kind = c.get("layer_types").and_then(|l| l.get(i));
    let kind = kind.and_then(Json::as_str);
    let attends = |l: &Json| {
        l.as_array()
            .is_some_and(|l| l.iter().any(|n| n.as_u64() == Some(i as u64)))
    };
    let unlisted = kind.is_none() && c.get("full_attn_idxs").is_some_and(|l| !attends(l));
    let convolution = family.convolution && (kind == Some("conv") || unlisted);
    let windowed = match kind {
        Some("sliding_attention") => true,
        Some("full_attention") => false,
        Some("conv") if convolution => false,
        Some(other) => {
            return Err(unknown(
                "layer type",
                other,
                ["full_attention", "sliding_attention"].into_iter(),
            ));
        }
        None => older_window(c, family, i)?,
    };
    let rope = if windowed { local_rope } else { 0 };
    let nope = nope || (family.global_nope && window.is_some() && !windowed);
    let nope = nope || family.learned_positions;
    Ok(LayerArch {
        rope: (!nope).then_some(rope),
        window: window.filter(|_| windowed),
        experts: config_sparse(c, family, i)?,
        convolution,
    })
}

/// Whether a layer has a window, where `layer_types` does not say.
fn older_window(c: &Config, family: &Family, i: usize) -> Result<bool> {
    if let Some(interval) = family.window_interval {
        let interval = c.size("sliding_window_pattern")?.unwrap_or(interval).max(1);
        return Ok(!(i + 1).is_multiple_of(interval));
    }
    match c.bool("use_sliding_window")? {
        Some(used) => Ok(used && i >= c.size("max_window_layers")?.unwrap_or(0)),
        None => Ok(i >= c.size("max_window_layers")?.unwrap_or(0)),
    }
}

/// The model's ropes: the global one, and the local one of windowed layers where the family has two.
fn config_ropes(
    c: &Config,
    family: &Family,
    head_dim: usize,
    context: usize,
) -> Result<(Vec<Rope>, Option<usize>)> {
    // transformers 5: "rope_parameters", flat or one per layer type; before: "rope_theta" and "rope_scaling".
    let parameters = c.get("rope_parameters");
    let (full, local) = match parameters {
        Some(p) if p.get("full_attention").is_some() => {
            (p.get("full_attention"), p.get("sliding_attention"))
        }
        other => (other, None),
    };
    let scaling = full.or_else(|| c.get("rope_scaling"));
    let base = |of: Option<&Json>| match of {
        Some(of) => c.of(of).float("rope_theta"),
        None => Ok(None),
    };
    let partial = match (
        full.and_then(|f| f.get("partial_rotary_factor")),
        c.float("partial_rotary_factor")?,
    ) {
        (Some(p), _) => p.as_f64().map(|p| p as f32),
        (None, p) => p,
    };
    let partial = match (partial, c.size("rotary_dim")?) {
        (None, Some(dim)) if head_dim > 0 => Some(dim as f32 / head_dim as f32),
        (partial, _) => partial,
    };
    let partial = partial.unwrap_or(family.partial_rotary).clamp(0.0, 1.0);
    let dim = (head_dim as f32 * partial) as usize;
    let theta = base(full)?
        .or(c.float("rope_theta")?)
        .unwrap_or(family.theta);
    let mut rope = Rope::new(base_frequencies(theta, dim));
    let mut original = None;
    if let Some(scaling) = scaling {
        original = config_scale(c, &c.of(scaling), context, theta, &mut rope)?;
    }
    let mut ropes = vec![rope];
    if let Some(of) = family.local_rope {
        let own = base(local)?.or(c.float("rope_local_base_freq")?).or(of);
        let theta = own.unwrap_or(theta);
        let mut rope = Rope::new(base_frequencies(theta, dim));
        if let Some(local) = local {
            config_scale(c, &c.of(local), context, theta, &mut rope)?;
        }
        ropes.push(rope);
    }
    Ok((ropes, original))
}

/// Apply a rope scaling; returns the original context size where long sequences differ.
fn config_scale(
    c: &Config,
    s: &Config,
    context: usize,
    base: f32,
    rope: &mut Rope,
) -> Result<Option<usize>> {
    let factor = |key: &str| -> Result<f32> {
        let x = s
            .float(key)?
            .ok_or_else(|| s.weights.problem(format!("rope scaling has no {key:?}")))?;
        if x > 0.0 {
            Ok(x)
        } else {
            Err(s
                .weights
                .problem(format!("rope scaling: {key:?} must be positive, got {x}")))
        }
    };
    match s
        .str("rope_type")
        .or_else(|| s.str("type"))
        .unwrap_or("default")
    {
        // Dynamic scaling begins beyond the context that the model was made for, where prompts end.
        "dynamic" if s.float("alpha")?.is_some_and(|x| x > 0.0) => {
            // hunyuan: by as much for all lengths.
            let (alpha, dim) = (factor("alpha")?, 2 * rope.frequencies.len());
            let power = dim as f64 / (dim as f64 - 2.0);
            let base = f64::from(base) * f64::from(alpha).powf(power);
            rope.frequencies = base_frequencies(base as f32, dim);
            Ok(None)
        }
        "default" | "dynamic" => Ok(None),
        "yarn" => config_yarn(s, context, base, rope).map(|()| None),
        "linear" => {
            let by = factor("factor")?;
            rope.frequencies.iter_mut().for_each(|f| *f /= by);
            Ok(None)
        }
        "llama3" => {
            let original = s.need("original_max_position_embeddings")? as f32;
            let (by, low, high) = (
                factor("factor")?,
                factor("low_freq_factor")?,
                factor("high_freq_factor")?,
            );
            rope.frequencies
                .iter_mut()
                .for_each(|f| *f = llama3_frequency(*f, original, by, low, high));
            Ok(None)
        }
        "longrope" | "su" => longrope(c, s, context, rope).map(Some),
        other => Err(unknown(
            "rope scaling",
            other,
            ["default", "linear", "dynamic", "llama3", "longrope", "yarn"].into_iter(),
        )),
    }
}

fn config_yarn(s: &Config, context: usize, base: f32, rope: &mut Rope) -> Result<()> {
    let key = "original_max_position_embeddings";
    let original = s.size(key)?.unwrap_or(context).max(1) as f32;
    let factor = s.float("factor")?.unwrap_or(context as f32 / original);
    let positive = |key: &str, or: f32| -> Result<f32> {
        let x = s.float(key)?.filter(|x| *x != 0.0).unwrap_or(or);
        match x > 0.0 {
            true => Ok(x),
            false => Err(s
                .weights
                .problem(format!("rope scaling: {key:?} must be positive, got {x}"))),
        }
    };
    let yarn = Yarn {
        factor: positive("factor", factor)?,
        original,
        fast: positive("beta_fast", 32.0)?,
        slow: positive("beta_slow", 1.0)?,
        truncate: s.bool("truncate")?.unwrap_or(true),
    };
    yarn.scale(base, &mut rope.frequencies);
    let scales = (s.float("mscale")?, s.float("mscale_all_dim")?);
    rope.factor = match (s.float("attention_factor")?, scales) {
        (Some(own), _) => own,
        (None, (Some(a), Some(b))) if a != 0.0 && b != 0.0 => {
            yarn_factor(factor, a) / yarn_factor(factor, b)
        }
        _ => yarn_factor(factor, 1.0),
    };
    if let Some(beta) = s.float("llama_4_scaling_beta")? {
        let each = original;
        rope.growth = Some(Growth { beta, each });
    }
    Ok(())
}

fn longrope(c: &Config, s: &Config, context: usize, rope: &mut Rope) -> Result<usize> {
    let key = "original_max_position_embeddings";
    let original = match s.size(key)? {
        Some(n) => n,
        None => c.need(key)?,
    }
    .max(1);
    let scaled = |key: &str| -> Result<Vec<f32>> {
        let by = s
            .floats(key)?
            .ok_or_else(|| s.weights.problem(format!("rope scaling has no {key:?}")))?;
        if by.len() != rope.frequencies.len() {
            let (got, want) = (by.len(), rope.frequencies.len());
            return Err(s.weights.problem(format!(
                "rope scaling: {key:?} has {got} factors, wanted {want}"
            )));
        }
        Ok(rope
            .frequencies
            .iter()
            .zip(by)
            .map(|(f, by)| f / by)
            .collect())
    };
    let (short, long) = (scaled("short_factor")?, scaled("long_factor")?);
    rope.factor = match (s.float("attention_factor")?, s.float("factor")?) {
        (Some(x), _) => x,
        (None, Some(factor)) => {
            longrope_factor((factor as f64 * original as f64) as usize, original)
        }
        (None, None) => longrope_factor(context, original),
    };
    (rope.frequencies, rope.long_frequencies) = (short, Some(long));
    Ok(original)
}

//! Which tensor of a model is kept as which type: the named mixtures of GGUF files. Numbers are not touched here.
//!
//! The mixtures are llama.cpp's (`llama-quantize`), by what is known of which tensors suffer most: the output, and in a part of
//! the layers the values and the second half of the feed-forward.

use hfcore_kernels::quant::TensorType;

use crate::error::{Error, Result};
use crate::weights::Target;

use TensorType::{
    BF16, F16, F32, FP4, IQ4_NL, IQ4_XS, MXFP4, NF4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1,
    Q5_K, Q6_K, Q8_0,
};

/// A mixture of types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// As files are named: `Q4_K_M`.
    pub name: &'static str,
    /// GGUF's `general.file_type`; none where no GGUF file can hold it.
    pub file_type: Option<u32>,
    base: TensorType,
    more: More,
}

/// What is kept better than the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum More {
    /// The output alone.
    Nothing,
    /// Values and the second half of the feed-forward, in the first layers.
    First(TensorType),
    /// The same, in the first and last eighth of the layers and in every third between.
    Some(TensorType),
    /// Q3_K_M, Q3_K_L, Q2_K: in all layers, by tensor.
    Low {
        value: TensorType,
        down: TensorType,
        out: TensorType,
    },
}

const fn recipe(name: &'static str, file_type: u32, base: TensorType, more: More) -> Recipe {
    Recipe {
        name,
        file_type: Some(file_type),
        base,
        more,
    }
}

const fn bitsandbytes(name: &'static str, base: TensorType) -> Recipe {
    Recipe {
        name,
        file_type: None,
        base,
        more: More::Nothing,
    }
}

const RECIPES: [Recipe; 23] = [
    recipe("F32", 0, F32, More::Nothing),
    recipe("F16", 1, F16, More::Nothing),
    recipe("BF16", 32, BF16, More::Nothing),
    recipe("Q8_0", 7, Q8_0, More::Nothing),
    recipe("Q6_K", 18, Q6_K, More::Nothing),
    recipe("Q5_K_M", 17, Q5_K, More::Some(Q6_K)),
    recipe("Q5_K_S", 16, Q5_K, More::Nothing),
    recipe("Q5_1", 9, Q5_1, More::Nothing),
    recipe("Q5_0", 8, Q5_0, More::Nothing),
    recipe("Q4_K_M", 15, Q4_K, More::Some(Q6_K)),
    recipe("Q4_K_S", 14, Q4_K, More::First(Q5_K)),
    recipe("Q4_1", 3, Q4_1, More::Nothing),
    recipe("Q4_0", 2, Q4_0, More::Nothing),
    recipe("IQ4_NL", 25, IQ4_NL, More::First(Q5_K)),
    recipe("IQ4_XS", 30, IQ4_XS, More::First(Q5_K)),
    recipe("MXFP4", 38, MXFP4, More::Nothing),
    bitsandbytes("NF4", NF4),
    bitsandbytes("FP4", FP4),
    recipe(
        "Q3_K_L",
        13,
        Q3_K,
        More::Low {
            value: Q5_K,
            down: Q5_K,
            out: Q5_K,
        },
    ),
    recipe(
        "Q3_K_M",
        12,
        Q3_K,
        More::Low {
            value: Q4_K,
            down: Q4_K,
            out: Q4_K,
        },
    ),
    recipe("Q3_K_S", 11, Q3_K, More::Nothing),
    recipe(
        "Q2_K",
        10,
        Q2_K,
        More::Low {
            value: Q4_K,
            down: Q3_K,
            out: Q3_K,
        },
    ),
    recipe("Q2_K_S", 21, Q2_K, More::First(Q4_K)),
];

/// Short for the usual one of their kind.
const SHORT: [(&str, &str); 3] = [("Q5_K", "Q5_K_M"), ("Q4_K", "Q4_K_M"), ("Q3_K", "Q3_K_M")];

/// A tensor's place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Embedding,
    Output,
    Value,
    Down,
    AttentionOutput,
    Other,
}

const ROLES: [(Role, &[&str]); 5] = [
    (Role::Embedding, &["token_embd", "embed_tokens", "wte"]),
    (Role::Output, &["output", "lm_head"]),
    (Role::Value, &["attn_v", "v_proj", "attn_qkv", "qkv_proj"]),
    (Role::Down, &["ffn_down", "ffn_down_exps", "down_proj"]),
    (Role::AttentionOutput, &["attn_output", "o_proj"]),
];

/// Small matrices that decide much: which expert runs.
const ROUTERS: [&str; 3] = ["ffn_gate_inp", "gate", "ffn_gate_inp_shexp"];

impl Recipe {
    /// The mixture of this name, in any case: `"q4_k_m"`, `"Q8_0"`.
    ///
    /// # Errors
    /// [`Error::Unsupported`], which names all there are.
    pub fn parse(name: &str) -> Result<Self> {
        let upper = name.to_ascii_uppercase();
        let short = SHORT.iter().find(|(short, _)| *short == upper);
        let wanted = short.map_or(upper.as_str(), |(_, whole)| whole);
        let found = RECIPES.iter().find(|recipe| recipe.name == wanted);
        found.copied().ok_or_else(|| Error::Unsupported {
            what: "quantization",
            name: name.to_owned(),
            supported: RECIPES.map(|recipe| recipe.name).join(", "),
        })
    }

    /// The type of the tensor `name` (GGUF's name or the checkpoint's) of this shape, outermost first, in a model of so many
    /// layers. `tied`: its embedding is its output too. Vectors, and what is no weight, stay F32.
    pub fn tensor_type(
        &self,
        name: &str,
        shape: &[usize],
        layers: usize,
        tied: bool,
    ) -> TensorType {
        let Some(cols) = shape.last().copied().filter(|_| shape.len() > 1) else {
            return F32;
        };
        let mut parts = name.strip_suffix(".weight").unwrap_or_default().rsplit('.');
        let own = parts.next().unwrap_or_default();
        if own.is_empty() || ROUTERS.contains(&own) {
            return F32;
        }
        let layer = parts.find_map(|part| part.parse::<usize>().ok());
        let role = role_of(name);
        fitting(self.of_role(role, layer.unwrap_or(0), layers, tied), cols)
    }

    fn of_role(&self, role: Role, layer: usize, layers: usize, tied: bool) -> TensorType {
        let whole = matches!(self.base, F32 | F16 | BF16 | Q8_0);
        match (role, self.more) {
            (Role::Output, _) if !whole => Q6_K,
            (Role::Embedding, _) if !whole && tied => Q6_K,
            (Role::Value | Role::Down, More::Some(better)) if often(layer, layers) => better,
            (Role::Value | Role::Down, More::First(better)) if layer < layers / 8 => better,
            (Role::Value, More::Low { value, .. }) => value,
            (Role::Down, More::Low { down, .. }) => down,
            (Role::AttentionOutput, More::Low { out, .. }) => out,
            _ => self.base,
        }
    }
}

/// The first and last eighth, and every third between.
fn often(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// What becomes of a model's matrices while they are made resident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AtLoad {
    pub recipe: Recipe,
    /// See [`Target`].
    pub nested: bool,
    /// Modules that stay as they are, by the checkpoint's names: whole names that one begins with, or its end, as
    /// transformers has it. `lm_head` is the output.
    pub skip: Vec<String>,
}

impl AtLoad {
    /// By a mixture alone.
    ///
    /// # Errors
    /// As [`Recipe::parse`].
    pub fn parse(name: &str) -> Result<Self> {
        Ok(Self {
            recipe: Recipe::parse(name)?,
            nested: false,
            skip: Vec::new(),
        })
    }

    /// What the matrix `name` of this shape becomes, whose blocks now are of `from`: see [`Recipe::tensor_type`]. `own` is
    /// the name that its file gives it. None: it stays as it is.
    pub fn target(
        &self,
        (name, own): (&str, &str),
        from: TensorType,
        shape: &[usize],
        (layers, tied): (usize, bool),
    ) -> Option<Target> {
        let tensor_type = self.recipe.tensor_type(name, shape, layers, tied);
        let head = is_output(name) || tied && is_embedding(name);
        let kept = head && self.skip.iter().any(|skip| skip == "lm_head")
            || self.skip.iter().any(|skip| matches(own, skip));
        // What fits no blocks stays as exact as it is.
        let unfit = tensor_type.block_len() == 1 && self.recipe.base.block_len() > 1;
        if kept || unfit || tensor_type == from || tensor_type == F32 && self.recipe.base != F32 {
            return None;
        }
        let nested = self.nested;
        Some(Target {
            tensor_type,
            nested,
        })
    }
}

fn is_output(name: &str) -> bool {
    role_of(name) == Role::Output
}

fn is_embedding(name: &str) -> bool {
    role_of(name) == Role::Embedding
}

fn role_of(name: &str) -> Role {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let own = name.rsplit('.').next().unwrap_or_default();
    let role = ROLES.iter().find(|(_, names)| names.contains(&own));
    role.map_or(Role::Other, |(role, _)| *role)
}

/// Whether a tensor belongs to the module, or modules, that are called so.
fn matches(own: &str, module: &str) -> bool {
    let own = own.strip_suffix(".weight").unwrap_or(own);
    let rest = own.strip_prefix(module);
    let begins = |rest: &str| rest.is_empty() || rest.starts_with('.') || module.ends_with('.');
    rest.is_some_and(begins) || own.ends_with(module)
}

/// The type nearest to `wanted` whose blocks rows of `cols` numbers are made of.
fn fitting(wanted: TensorType, cols: usize) -> TensorType {
    let smaller = match wanted {
        Q2_K | Q3_K | IQ4_XS => IQ4_NL,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K | NF4 | FP4 => Q8_0,
        other => other,
    };
    let fits = |ty: &TensorType| cols.is_multiple_of(ty.block_len());
    [wanted, smaller].into_iter().find(fits).unwrap_or(F16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_its_own_and_short_ones_are_the_usual() {
        for recipe in RECIPES {
            assert_eq!(Recipe::parse(&recipe.name.to_lowercase()).unwrap(), recipe);
        }
        assert_eq!(Recipe::parse("q4_k").unwrap().name, "Q4_K_M");
        let error = Recipe::parse("q9").unwrap_err().to_string();
        assert!(
            error.contains("\"q9\"") && error.contains("Q4_K_M"),
            "{error}"
        );
    }

    #[test]
    fn the_usual_mixture_keeps_the_output_and_some_layers_better() {
        let recipe = Recipe::parse("q4_k_m").unwrap();
        let of = |name: &str, tied| recipe.tensor_type(name, &[512, 512], 16, tied);
        assert_eq!(of("output.weight", false), Q6_K);
        assert_eq!(
            (
                of("token_embd.weight", false),
                of("token_embd.weight", true)
            ),
            (Q4_K, Q6_K)
        );
        assert_eq!(of("blk.0.attn_q.weight", false), Q4_K);
        let better: Vec<usize> = (0..16)
            .filter(|i| of(&format!("blk.{i}.ffn_down.weight"), false) == Q6_K)
            .collect();
        assert_eq!(better, [0, 1, 4, 7, 10, 13, 14, 15]);
        for i in 0..16 {
            let names = [
                (
                    format!("blk.{i}.attn_v.weight"),
                    format!("model.layers.{i}.self_attn.v_proj.weight"),
                ),
                (
                    format!("blk.{i}.ffn_down.weight"),
                    format!("model.layers.{i}.mlp.down_proj.weight"),
                ),
                (
                    format!("blk.{i}.ffn_up.weight"),
                    format!("model.layers.{i}.mlp.up_proj.weight"),
                ),
            ];
            for (gguf, hf) in names {
                assert_eq!(of(&gguf, false), of(&hf, false), "{gguf} {hf}");
            }
        }
    }

    #[test]
    fn what_is_skipped_or_fits_no_blocks_stays_as_it_is() {
        let at_load = AtLoad {
            skip: ["lm_head", "layers.1.", "k_proj"].map(String::from).into(),
            ..AtLoad::parse("nf4").unwrap()
        };
        let of = |name: &str, cols, tied| {
            let target = at_load.target((name, name), BF16, &[512, cols], (4, tied));
            target.map(|target| target.tensor_type)
        };
        let at = |i: usize, module: &str| format!("model.layers.{i}.self_attn.{module}.weight");
        assert_eq!(of(&at(0, "q_proj"), 512, false), Some(NF4));
        assert_eq!(of(&at(0, "q_proj"), 96, false), Some(Q8_0));
        assert_eq!(of(&at(0, "q_proj"), 50, false), None);
        assert_eq!(of(&at(0, "k_proj"), 512, false), None);
        assert_eq!(of("lm_head.weight", 512, false), None);
        assert_eq!(of("model.embed_tokens.weight", 512, true), None);
        let plain = AtLoad::parse("q4_k_m").unwrap();
        let of = |name: &str, from| {
            let target = plain.target((name, name), from, &[512, 512], (4, true));
            target.map(|target| target.tensor_type)
        };
        assert_eq!(of("model.embed_tokens.weight", BF16), Some(Q6_K));
        assert_eq!(of("blk.2.attn_q.weight", F32), Some(Q4_K));
        assert_eq!(of("blk.2.attn_q.weight", Q4_K), None);
        assert_eq!(of("blk.2.attn_norm.weight", F16), Some(Q4_K));
    }

    #[test]
    fn what_is_small_or_does_not_fit_is_kept_as_it_can_be() {
        let recipe = Recipe::parse("q4_k_m").unwrap();
        let of = |name: &str, shape: &[usize]| recipe.tensor_type(name, shape, 4, false);
        assert_eq!(of("blk.0.attn_norm.weight", &[512]), F32);
        assert_eq!(of("blk.0.attn_q.bias", &[512]), F32);
        assert_eq!(of("blk.0.ffn_gate_inp.weight", &[8, 512]), F32);
        assert_eq!(of("blk.2.attn_q.weight", &[512, 96]), Q5_0);
        assert_eq!(of("output.weight", &[512, 96]), Q8_0);
        assert_eq!(of("blk.2.attn_q.weight", &[512, 50]), F16);
        assert_eq!(of("blk.2.ffn_down_exps.weight", &[8, 512, 256]), Q6_K);
    }
}

//! compressed-tensors (llm-compressor, vLLM): whole numbers, packed or a byte each, and floats of 8 bits.

use serde_json::Value as Json;

use super::{FLOATS, Parts, block_size, fp8, unsupported, whole};
use crate::error::Result;
use crate::quantised::{Dtype, Groups, Layout, Part, Quantised, Scales, Values, Zeros};

/// What the groups of a configuration say of matrices. Which of them holds for which matrix, the parts say.
#[derive(Debug)]
pub(crate) struct Options {
    bits: Vec<usize>,
    blocks: Vec<[usize; 2]>,
    /// Weights are stored as they were before, rounded.
    dense: bool,
}

const FORMATS: [&str; 6] = [
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "mixed-precision",
    "dense",
];

impl Options {
    pub(super) fn read(config: &Json) -> Result<Self> {
        let format = |of: &Json| of.get("format").and_then(Json::as_str).map(str::to_owned);
        let groups: Vec<&Json> = match config.get("config_groups").and_then(Json::as_object) {
            Some(groups) => groups.values().collect(),
            None => Vec::new(),
        };
        let named = groups.iter().copied().chain([config]).filter_map(format);
        for name in named {
            if !FORMATS.contains(&name.as_str()) {
                let supported = FORMATS.join(", ");
                return Err(unsupported("compressed-tensors format", &name, &supported));
            }
        }
        let sparse = config.get("sparsity_config").and_then(format);
        if let Some(name) = sparse.filter(|name| name != "dense") {
            return Err(unsupported("sparsity", &name, "dense"));
        }
        let of_weights = groups.iter().filter_map(|group| group.get("weights"));
        Ok(Self {
            bits: of_weights
                .clone()
                .filter_map(|w| whole(w, "num_bits"))
                .collect(),
            blocks: of_weights
                .filter_map(|w| block_size(w, "block_structure"))
                .collect(),
            dense: format(config).as_deref() == Some("dense"),
        })
    }
}

pub(super) fn gather(parts: &mut Parts, options: &Options) -> Result<()> {
    for module in parts.ending(".weight_packed") {
        let matrix = packed(parts, &module, options)?;
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    for module in parts.of_dtype(".weight", &[Dtype::F8E4M3, Dtype::F8E5M2]) {
        let matrix = fp8::matrix(parts, &module, "weight_scale", &options.blocks)?;
        // Always 0, where it is written at all: floats are symmetric.
        parts.take(&format!("{module}.weight_zero_point"));
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    for module in parts.of_dtype(".weight", &[Dtype::I8]) {
        let matrix = whole_bytes(parts, &module, options)?;
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    parts.forget(&[
        ".input_scale",
        ".input_zero_point",
        ".output_scale",
        ".output_zero_point",
        ".q_scale",
        ".k_scale",
        ".v_scale",
        ".k_zero_point",
        ".v_zero_point",
    ]);
    if options.dense {
        parts.forget(&[".weight_scale", ".weight_zero_point", ".weight_g_idx"]);
    }
    Ok(())
}

/// Codes of 2, 4 or 8 bits in words, each more than its number by half of what there are.
fn packed(parts: &mut Parts, module: &str, options: &Options) -> Result<Quantised> {
    let part = |end: &str| format!("{module}.{end}");
    let codes = parts.require(&part("weight_packed"))?;
    let [_, words] = parts.matrix(&part("weight_packed"), &codes, &[Dtype::I32])?;
    let shape = parts.require_as(&part("weight_shape"), &[Dtype::I64, Dtype::I32], &[2])?;
    let sizes: Vec<usize> = shape
        .integers(&parts.weights.files)
        .filter_map(|n| usize::try_from(n).ok().filter(|n| *n > 0))
        .collect();
    let fits = |bits: &usize| {
        let of = |inputs: &usize| inputs.checked_mul(*bits).map(|n| n.div_ceil(32));
        sizes.get(1).and_then(of) == Some(words)
    };
    let mut known = [2, 4, 8].into_iter().filter(fits);
    let bits = known.clone().find(|bits| options.bits.contains(bits));
    let (Some(bits), &[outputs, inputs]) = (bits.or(known.next_back()), &sizes[..]) else {
        let got = &codes.shape;
        return Err(parts.problem(format!(
            "{module:?} has codes {got:?} for {sizes:?}: not of 2, 4 or 8 bits"
        )));
    };
    let shape = [outputs, inputs];
    parts.check(
        &part("weight_packed"),
        &codes,
        &[Dtype::I32],
        &[outputs, words],
    )?;
    let (scales, groups, grid) = scales(parts, module, shape, options)?;
    let zero_point = parts.take(&part("weight_zero_point"));
    let half = 1 << (bits - 1);
    let bits = bits as u32;
    let zeros = match zero_point {
        Some(zeros) if zeros.dtype == Dtype::I32 => {
            let words = (grid[0] * bits as usize).div_ceil(32);
            let name = part("weight_zero_point");
            parts.check(&name, &zeros, &[Dtype::I32], &[words, grid[1]])?;
            Zeros::Each {
                part: zeros,
                layout: Layout::Columns(bits),
                transposed: true,
                add: 0,
            }
        }
        // One for the whole matrix is not packed: less than the code for 0 by 128 where it has 8 bits.
        Some(zeros) if bits == 8 => signed_zeros(parts, &part("weight_zero_point"), zeros, grid)?,
        Some(zeros) => {
            let got = zeros.dtype.name();
            return Err(parts.problem(format!(
                "tensor {:?} is {got}, wanted I32",
                part("weight_zero_point")
            )));
        }
        None => Zeros::Fixed(half),
    };
    Ok(Quantised {
        kind: if bits == 8 { "INT8" } else { "INT4" },
        shape,
        codes,
        layout: Layout::Rows(bits),
        values: Values::Whole,
        scales,
        zeros,
        groups,
    })
}

/// A byte for each code.
fn whole_bytes(parts: &mut Parts, module: &str, options: &Options) -> Result<Quantised> {
    let part = |end: &str| format!("{module}.{end}");
    let codes = parts.require(&part("weight"))?;
    let shape = parts.matrix(&part("weight"), &codes, &[Dtype::I8])?;
    let (scales, groups, grid) = scales(parts, module, shape, options)?;
    let zeros = match parts.take(&part("weight_zero_point")) {
        Some(zeros) => signed_zeros(parts, &part("weight_zero_point"), zeros, grid)?,
        None => Zeros::Fixed(128),
    };
    Ok(Quantised {
        kind: "INT8",
        shape,
        codes,
        layout: Layout::Signed,
        values: Values::Whole,
        scales,
        zeros,
        groups,
    })
}

/// Zero points of a byte each, one for each scale.
fn signed_zeros(parts: &Parts, name: &str, zeros: Part, grid: [usize; 2]) -> Result<Zeros> {
    if zeros.dtype != Dtype::I8 || zeros.bytes.len() != grid[0] * grid[1] {
        let (got, of) = (zeros.dtype.name(), &zeros.shape);
        return Err(parts.problem(format!(
            "tensor {name:?} is {got} {of:?}, wanted I8 {grid:?}"
        )));
    }
    Ok(Zeros::Each {
        part: zeros,
        layout: Layout::Signed,
        transposed: false,
        add: 0,
    })
}

/// The scales of a module, who shares them, and their rows and columns.
fn scales(
    parts: &mut Parts,
    module: &str,
    [outputs, inputs]: [usize; 2],
    options: &Options,
) -> Result<(Scales, Groups, [usize; 2])> {
    let name = format!("{module}.weight_scale");
    let part = parts.require(&name)?;
    if !FLOATS.contains(&part.dtype) {
        let got = part.dtype.name();
        return Err(parts.problem(format!("tensor {name:?} is {got}, wanted floats")));
    }
    let mut groups = parts.blocks(&name, &part.shape, [outputs, inputs], &options.blocks)?;
    let Groups::Blocks([rows, each]) = groups else {
        return Err(parts.problem(format!("tensor {name:?} has no blocks")));
    };
    let grid = [outputs.div_ceil(rows), inputs.div_ceil(each)];
    let index_name = format!("{module}.weight_g_idx");
    if let Some(index) = parts.take(&index_name) {
        // -1: there is room for an order, but none.
        let written = !index
            .integers(&parts.weights.files)
            .any(|group| group == -1);
        if written && rows == 1 {
            groups = parts.index(&index_name, &index, inputs, each, grid[1])?;
        }
    }
    let scales = Scales::Plain {
        part,
        transposed: false,
        divisor: 1.0,
    };
    Ok((scales, groups, grid))
}

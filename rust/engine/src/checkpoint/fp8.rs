//! Floats of 8 bits whose blocks share a scale: DeepSeek-V3 and those that transformers calls `fp8`.

use serde_json::Value as Json;

use super::{FLOATS, Parts, block_size};
use crate::error::Result;
use crate::quantised::{Dtype, Layout, Quantised, Scales, Values, Zeros};

/// What a configuration says of all matrices.
#[derive(Debug)]
pub(crate) struct Options {
    block: Option<[usize; 2]>,
}

impl Options {
    pub(super) fn read(config: &Json) -> Self {
        Self {
            block: block_size(config, "weight_block_size"),
        }
    }
}

pub(super) fn gather(parts: &mut Parts, options: &Options) -> Result<()> {
    parts.forget(&[".activation_scale", ".input_scale", ".k_scale", ".v_scale"]);
    for module in parts.of_dtype(".weight", &[Dtype::F8E4M3, Dtype::F8E5M2]) {
        let matrix = matrix(parts, &module, "weight_scale_inv", options.block.as_slice())?;
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    Ok(())
}

/// The floats of `module`, whose scales are called `scale`, or simply `weight_scale`; of blocks of one of these sizes.
pub(super) fn matrix(
    parts: &mut Parts,
    module: &str,
    scale: &str,
    sizes: &[[usize; 2]],
) -> Result<Quantised> {
    let name = format!("{module}.weight");
    let codes = parts.require(&name)?;
    let shape = parts.matrix(&name, &codes, &[Dtype::F8E4M3, Dtype::F8E5M2])?;
    let plain = format!("{module}.weight_scale");
    let scale = Some(format!("{module}.{scale}")).filter(|name| parts.has(name));
    let scale = scale.unwrap_or(plain);
    let scales = parts.require(&scale)?;
    if ![&FLOATS[..], &[Dtype::F8E8M0, Dtype::U8]]
        .concat()
        .contains(&scales.dtype)
    {
        let (got, wanted) = (scales.dtype.name(), "floats or powers of two");
        return Err(parts.problem(format!("tensor {scale:?} is {got}, wanted {wanted}")));
    }
    let groups = parts.blocks(&scale, &scales.shape, shape, sizes)?;
    Ok(Quantised {
        kind: "FP8",
        shape,
        layout: Layout::Bytes,
        values: match codes.dtype {
            Dtype::F8E5M2 => Values::E5M2,
            _ => Values::E4M3,
        },
        codes,
        scales: Scales::Plain {
            part: scales,
            transposed: false,
            divisor: 1.0,
        },
        zeros: Zeros::Fixed(0),
        groups,
    })
}

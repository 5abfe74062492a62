//! GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel store it: codes down the inputs, zero points along the outputs.

use serde_json::Value as Json;

use super::{FLOATS, Parts, unsupported, whole};
use crate::error::Result;
use crate::quantised::{Dtype, Groups, Layout, Quantised, Scales, Values, Zeros};

/// What a configuration says of all matrices.
#[derive(Debug)]
pub(crate) struct Options {
    /// Zero points are stored less one.
    add: u8,
    group_size: Option<usize>,
}

impl Options {
    pub(super) fn read(config: &Json) -> Result<Self> {
        let named = ["checkpoint_format", "format"].map(|key| config.get(key));
        let format = named.into_iter().flatten().find_map(Json::as_str);
        let add = match format {
            None | Some("gptq") => 1,
            Some("gptq_v2") => 0,
            Some(other) => return Err(unsupported("GPTQ format", other, "gptq, gptq_v2")),
        };
        if let Some(bits) = whole(config, "bits").filter(|bits| ![2, 4, 8].contains(bits)) {
            return Err(unsupported("GPTQ bits", &bits.to_string(), "2, 4, 8"));
        }
        Ok(Self {
            add,
            group_size: whole(config, "group_size"),
        })
    }
}

pub(super) fn gather(parts: &mut Parts, options: &Options) -> Result<()> {
    for module in parts.ending(".qweight") {
        let matrix = matrix(parts, &module, options)?;
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    Ok(())
}

/// The parts' shapes say all that some configurations say for each module.
fn matrix(parts: &mut Parts, module: &str, options: &Options) -> Result<Quantised> {
    let part = |end: &str| format!("{module}.{end}");
    let (codes, zeros) = (
        parts.require(&part("qweight"))?,
        parts.require(&part("qzeros"))?,
    );
    let scales = parts.require(&part("scales"))?;
    let [words, outputs] = parts.matrix(&part("qweight"), &codes, &[Dtype::I32])?;
    let [groups, zero_words] = parts.matrix(&part("qzeros"), &zeros, &[Dtype::I32])?;
    parts.check(&part("scales"), &scales, &FLOATS, &[groups, outputs])?;
    let bits = [2, 4, 8]
        .into_iter()
        .find(|bits| outputs.checked_mul(*bits) == zero_words.checked_mul(32));
    let Some(bits) = bits else {
        let (codes, zeros) = (&codes.shape, &zeros.shape);
        return Err(parts.problem(format!(
            "{module:?} has codes {codes:?} and zero points {zeros:?}: not of 2, 4 or 8 bits"
        )));
    };
    // As many codes as the part has bits for: this cannot overflow.
    let inputs = words * (32 / bits);
    let each = options
        .group_size
        .filter(|each| inputs.div_ceil(*each) == groups)
        .unwrap_or(inputs.div_ceil(groups));
    if inputs.div_ceil(each) != groups {
        let problem = format!("{module:?} has {groups} groups of {inputs} inputs");
        return Err(parts.problem(problem));
    }
    let groups = match parts.take(&part("g_idx")) {
        Some(index) => parts.index(&part("g_idx"), &index, inputs, each, groups)?,
        None => Groups::Blocks([1, each]),
    };
    let bits = bits as u32;
    Ok(Quantised {
        kind: "GPTQ",
        shape: [outputs, inputs],
        codes,
        layout: Layout::Columns(bits),
        values: Values::Whole,
        scales: Scales::Plain {
            part: scales,
            transposed: true,
            divisor: 1.0,
        },
        zeros: Zeros::Each {
            part: zeros,
            layout: Layout::Rows(bits),
            transposed: true,
            add: options.add,
        },
        groups,
    })
}

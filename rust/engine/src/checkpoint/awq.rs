//! AWQ (Lin et al. 2023) as AutoAWQ stores it for its GEMM kernels: eight outputs in a word, in an order of their own.

use serde_json::Value as Json;

use super::{FLOATS, Parts, unsupported, whole};
use crate::error::Result;
use crate::quantised::{Dtype, Groups, Layout, Quantised, Scales, Values, Zeros};

pub(super) fn check(config: &Json) -> Result<()> {
    let named = ["version", "format"].map(|key| config.get(key));
    let format = named.into_iter().flatten().find_map(Json::as_str);
    if let Some(other) = format.filter(|format| !format.eq_ignore_ascii_case("gemm")) {
        return Err(unsupported("AWQ version", other, "gemm"));
    }
    match whole(config, "bits").filter(|bits| *bits != 4) {
        Some(bits) => Err(unsupported("AWQ bits", &bits.to_string(), "4")),
        None => Ok(()),
    }
}

pub(super) fn gather(parts: &mut Parts) -> Result<()> {
    for module in parts.ending(".qweight") {
        let matrix = matrix(parts, &module)?;
        parts.insert(format!("{module}.weight"), matrix)?;
    }
    Ok(())
}

fn matrix(parts: &mut Parts, module: &str) -> Result<Quantised> {
    let part = |end: &str| format!("{module}.{end}");
    let (codes, zeros) = (
        parts.require(&part("qweight"))?,
        parts.require(&part("qzeros"))?,
    );
    let scales = parts.require(&part("scales"))?;
    let [inputs, words] = parts.matrix(&part("qweight"), &codes, &[Dtype::I32])?;
    let [groups, _] = parts.matrix(&part("qzeros"), &zeros, &[Dtype::I32])?;
    parts.check(&part("qzeros"), &zeros, &[Dtype::I32], &[groups, words])?;
    parts.check(&part("scales"), &scales, &FLOATS, &[groups, words * 8])?;
    if !inputs.is_multiple_of(groups) {
        let problem = format!("{module:?} has {groups} groups of {inputs} inputs");
        return Err(parts.problem(problem));
    }
    Ok(Quantised {
        kind: "AWQ",
        shape: [words * 8, inputs],
        codes,
        layout: Layout::Awq,
        values: Values::Whole,
        scales: Scales::Plain {
            part: scales,
            transposed: true,
            divisor: 1.0,
        },
        zeros: Zeros::Each {
            part: zeros,
            layout: Layout::Awq,
            transposed: false,
            add: 0,
        },
        groups: Groups::Blocks([1, inputs / groups]),
    })
}

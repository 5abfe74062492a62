//! Filters that escape, quote and link: HTML and URLs.

use super::super::checks;
use super::super::methods;
use super::super::origin::Str;
use super::super::run::{CallArgs, Run};
use super::super::text;
use super::super::value::{Budget, Res, Value, fault, html_escape};

pub(super) fn filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let budget = &mut run.budget;
    let s = value.to_str(budget)?;
    budget.bytes(s.text.len())?;
    match name {
        "string" => Ok(Value::Str(s)),
        "safe" => Ok(Value::Str(Str { markup: true, ..s })),
        "escape" | "e" if s.markup => Ok(Value::Str(s)),
        "escape" | "e" | "forceescape" => {
            budget.bytes(s.text.len().saturating_mul(5))?;
            let escaped = s.made_into(html_escape(&s.text));
            Ok(Value::Str(Str {
                markup: true,
                ..escaped
            }))
        }
        "striptags" => Ok(Value::Str(Str {
            markup: false,
            ..s.made_into(strip_tags(&s.text))
        })),
        "pprint" => {
            let text = value.repr(budget)?;
            Ok(Value::made(text, budget))
        }
        "urlencode" => url_encode(run, value),
        _ => {
            let [space] = args.bind(name, ["autospace"])?;
            let Value::Dict(d) = value else {
                return fault("xmlattr needs a dict");
            };
            let mut out = String::new();
            for (key, value) in &d.entries {
                if matches!(value, Value::None | Value::Undefined(_)) {
                    continue;
                }
                let (key, value) = (key.to_text(budget)?, value.to_text(budget)?);
                if key.contains([' ', '/', '>', '=', '\t', '\n', '\u{c}']) {
                    return fault(format!("Invalid character in attribute name: '{key}'"));
                }
                let gap = if out.is_empty() && !space.as_ref().is_none_or(Value::truth) {
                    ""
                } else {
                    " "
                };
                budget.bytes(6 * (key.len() + value.len()) + 4)?;
                out.push_str(&format!(
                    "{gap}{}=\"{}\"",
                    html_escape(&key),
                    html_escape(&value)
                ));
            }
            Ok(Value::Str(Str {
                text: out.into(),
                markup: run.autoescape,
                origin: run.budget.unsure(),
            }))
        }
    }
}

fn strip_tags(t: &str) -> String {
    let mut plain = String::with_capacity(t.len());
    let mut rest = t;
    while let Some(start) = rest.find('<') {
        let end = match rest[start..].starts_with("<!--") {
            true => rest[start..].find("-->").map(|e| e + 3),
            false => rest[start..].find('>').map(|e| e + 1),
        };
        let Some(end) = end else { break };
        plain.push_str(&rest[..start]);
        rest = &rest[start + end..];
    }
    plain.push_str(rest);
    let joined = text::words(&plain, usize::MAX).join(" ");
    // `&amp;` last, so that `&amp;lt;` gives `&lt;`.
    let named = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", "\u{a0}"),
    ];
    named
        .iter()
        .fold(joined, |text, (entity, c)| text.replace(entity, c))
        .replace("&amp;", "&")
}

fn url_encode(run: &mut Run<'_>, value: &Value) -> Res<Value> {
    let quote = |value: &Value, form: bool, budget: &mut Budget| -> Res<String> {
        let t = value.to_text(budget)?;
        budget.bytes(t.len().saturating_mul(3))?;
        let mut out = String::new();
        for b in t.bytes() {
            match b {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    out.push(b as char)
                }
                b'/' if !form => out.push('/'),
                b' ' if form => out.push('+'),
                b => out.push_str(&format!("%{b:02X}")),
            }
        }
        Ok(out)
    };
    let pairs = match value {
        Value::Dict(d) => methods::pairs(d, &mut run.budget)?,
        other if matches!(other, Value::Str(_)) || !checks::is_iterable(other) => {
            let text = quote(value, false, &mut run.budget)?;
            return Ok(Value::made(text, &run.budget));
        }
        other => run.items(other)?,
    };
    let mut out = String::new();
    for pair in pairs {
        let pair = run.items(&pair)?;
        let [key, value] = &pair[..] else {
            return fault("urlencode needs pairs");
        };
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(&format!(
            "{}={}",
            quote(key, true, &mut run.budget)?,
            quote(value, true, &mut run.budget)?
        ));
    }
    Ok(Value::made(out, &run.budget))
}

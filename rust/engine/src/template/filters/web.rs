//! Filters that escape, quote and link: HTML and URLs.

use std::sync::Arc;

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
        "urlize" => urlize(run, &s, args),
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
                let Value::Str(key) = key else {
                    let kind = key.type_name();
                    return fault(format!(
                        "expected string or bytes-like object, got '{kind}'"
                    ));
                };
                let (key, value) = (&key.text, value.to_text(budget)?);
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
                    html_escape(key),
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

/// Links around what looks like an address in the text.
fn urlize(run: &mut Run<'_>, s: &Str, args: CallArgs) -> Res<Value> {
    let names = [
        "trim_url_limit",
        "nofollow",
        "target",
        "rel",
        "extra_schemes",
    ];
    let [limit, nofollow, target, rel, schemes] = args.bind("urlize", names)?;
    let given = |value: Option<Value>| value.filter(|v| !matches!(v, Value::None));
    let limit = match given(limit).map(|l| l.as_int()) {
        None => None,
        Some(Some(limit)) => Some(usize::try_from(limit).unwrap_or(0)),
        Some(None) => return fault("trim_url_limit must be an integer"),
    };
    let rel = given(rel).unwrap_or_else(|| Value::from(""));
    let rel = rel.to_text(&mut run.budget)?;
    let mut rels: Vec<&str> = text::words(&rel, usize::MAX);
    rels.push("noopener");
    if nofollow.is_some_and(|n| n.truth()) {
        rels.push("nofollow");
    }
    rels.sort_unstable();
    rels.dedup();
    let mut attributes = format!(" rel=\"{}\"", html_escape(&rels.join(" ")));
    if let Some(target) = given(target).filter(Value::truth) {
        let target = html_escape(&target.to_text(&mut run.budget)?);
        attributes.push_str(&format!(" target=\"{target}\""));
    }
    let mut extra = Vec::new();
    if let Some(schemes) = given(schemes) {
        for scheme in run.items(&schemes)? {
            extra.push(scheme.to_text(&mut run.budget)?);
        }
    }
    let escaped = if s.markup {
        s.text.to_string()
    } else {
        html_escape(&s.text)
    };
    run.budget
        .bytes(escaped.len().saturating_mul(4 + attributes.len() / 4))?;
    let mut out = String::new();
    let mut rest = &*escaped;
    while !rest.is_empty() {
        let word = rest.find(text::is_space).unwrap_or(rest.len());
        out.push_str(&linked(&rest[..word], limit, &attributes, &extra));
        let blank = rest[word..]
            .find(|c| !text::is_space(c))
            .map_or(rest.len(), |n| word + n);
        out.push_str(&rest[word..blank]);
        rest = &rest[blank..];
    }
    Ok(Value::Str(Str {
        markup: run.autoescape,
        ..s.made_into(out)
    }))
}

/// One word, as a link if it is an address; brackets and points around it stay outside.
fn linked(word: &str, limit: Option<usize>, attributes: &str, extra: &[Arc<str>]) -> String {
    let opening = ["(", "<", "&lt;"];
    let closing = [")", ">", ".", ",", "&gt;"];
    let mut middle = word;
    while let Some(rest) = opening.iter().find_map(|o| middle.strip_prefix(o)) {
        middle = rest;
    }
    let head = &word[..word.len() - middle.len()];
    let after_head = middle;
    while let Some(rest) = closing.iter().find_map(|c| middle.strip_suffix(c)) {
        middle = rest;
    }
    let mut end = middle.len();
    // A bracket that was opened inside is closed inside.
    for (open, close) in [("(", ")"), ("<", ">"), ("&lt;", "&gt;")] {
        let (middle, tail) = after_head.split_at(end);
        let opened = middle.matches(open).count();
        if opened <= middle.matches(close).count() {
            continue;
        }
        for _ in 0..opened.min(tail.matches(close).count()) {
            if let Some(at) = after_head[end..].find(close) {
                end += at + close.len();
            }
        }
    }
    let (middle, tail) = after_head.split_at(end);
    let shown = match limit.and_then(|limit| middle.char_indices().nth(limit)) {
        Some((at, _)) => format!("{}...", &middle[..at]),
        None => middle.to_owned(),
    };
    let is_extra = |scheme: &Arc<str>| *middle != **scheme && middle.starts_with(&**scheme);
    let link = if is_url(middle) {
        let https = match middle.starts_with("https://") || middle.starts_with("http://") {
            true => "",
            false => "https://",
        };
        format!("<a href=\"{https}{middle}\"{attributes}>{shown}</a>")
    } else if let Some(address) = middle.strip_prefix("mailto:").filter(|a| is_email(a)) {
        format!("<a href=\"{middle}\">{address}</a>")
    } else if !middle.starts_with("www.")
        && !middle.starts_with('@')
        && !middle.contains(':')
        && is_email(middle)
    {
        format!("<a href=\"mailto:{middle}\">{middle}</a>")
    } else if extra.iter().any(is_extra) {
        format!("<a href=\"{middle}\"{attributes}>{middle}</a>")
    } else {
        middle.to_owned()
    };
    format!("{head}{link}{tail}")
}

fn is_word(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}

/// A scheme or www and a host, or a host under one of the oldest domains; a port; a path.
fn is_url(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let scheme = ["https://", "http://"]
        .iter()
        .find_map(|s| lower.strip_prefix(s));
    if scheme.is_some_and(is_ip) {
        return true;
    }
    let rest = scheme.or_else(|| lower.strip_prefix("www."));
    if rest.is_some_and(|rest| {
        is_host(rest, |label, last| match last {
            true => is_top_domain(label),
            false => !label.is_empty() && label.chars().all(|c| is_word(c) || "%-".contains(c)),
        })
    }) {
        return true;
    }
    let old = ["com", "net", "int", "edu", "gov", "org", "info", "mil"];
    let long = |label: &str| (2..=63).contains(&label.chars().count());
    lower.contains('.')
        && is_host(&lower, |label, last| match last {
            true => old.contains(&label) && lower.split(['/', ':', '?', '#']).next() != Some(label),
            false => long(label) && label.chars().all(|c| is_word(c) || "%-".contains(c)),
        })
}

fn is_top_domain(label: &str) -> bool {
    let length = label.chars().count();
    match label.strip_prefix("xn--") {
        Some(rest) => {
            (2..=59).contains(&rest.chars().count()) && rest.chars().all(|c| is_word(c) || c == '%')
        }
        None => (2..=63).contains(&length) && label.bytes().all(|b| b.is_ascii_lowercase()),
    }
}

/// Labels with points between them, then perhaps a port and a path.
fn is_host(text: &str, fits: impl Fn(&str, bool) -> bool) -> bool {
    let end = text.find([':', '/', '?', '#']).unwrap_or(text.len());
    let labels: Vec<&str> = text[..end].split('.').collect();
    let all = labels
        .iter()
        .enumerate()
        .all(|(i, label)| fits(label, i + 1 == labels.len()));
    all && is_rest(&text[end..])
}

fn is_ip(text: &str) -> bool {
    if let Some(inner) = text.strip_prefix('[') {
        let Some((address, rest)) = inner.split_once(']') else {
            return false;
        };
        let groups: Vec<&str> = address.split(':').collect();
        let hex = |g: &&str| g.len() <= 4 && g.bytes().all(|b| b.is_ascii_hexdigit());
        return (3..=9).contains(&groups.len()) && groups.iter().all(hex) && is_rest(rest);
    }
    let end = text.find([':', '/', '?', '#']).unwrap_or(text.len());
    let parts: Vec<&str> = text[..end].split('.').collect();
    let number = |p: &&str| (1..=3).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit());
    parts.len() == 4 && parts.iter().all(number) && is_rest(&text[end..])
}

/// A port, a path.
fn is_rest(text: &str) -> bool {
    let path = match text.strip_prefix(':') {
        None => text,
        Some(rest) => {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if !(1..=5).contains(&digits) {
                return false;
            }
            &rest[digits..]
        }
    };
    path.is_empty() || path.starts_with(['/', '?', '#'])
}

fn is_email(text: &str) -> bool {
    let Some((name, host)) = text.rsplit_once('@') else {
        return false;
    };
    let Some((domain, top)) = host.rsplit_once('.') else {
        return false;
    };
    !name.is_empty()
        && domain.starts_with(is_word)
        && domain.chars().all(|c| is_word(c) || ".-".contains(c))
        && !top.is_empty()
        && top.chars().all(is_word)
}

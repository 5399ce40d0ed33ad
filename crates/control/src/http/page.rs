//! Lists a page at a time: an array in the body, and a header that says how to go on.

use std::fmt::Display;
use std::str::FromStr;

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue};
use serde::Serialize;

use super::extract::Query;
use crate::app::Failure;

/// What the parts of a page are called.
#[derive(Debug)]
pub(super) struct Style {
    /// The parameter that says where to go on.
    from: &'static str,
    /// The header that says what to write there for the next page.
    next: HeaderName,
    /// That header as the documentation writes it.
    shown: &'static str,
    /// Entries of a page where nothing is said, and at most.
    usual: u64,
    most: u64,
}

/// The native API's.
pub(super) static NATIVE: Style = Style {
    from: "cursor",
    next: HeaderName::from_static("x-next-cursor"),
    shown: "X-Next-Cursor",
    usual: 100,
    most: 1000,
};

/// That of E2B's clients.
pub(super) static E2B: Style = Style {
    from: "nextToken",
    next: HeaderName::from_static("x-next-token"),
    shown: "X-Next-Token",
    usual: 100,
    most: 100,
};

/// A page that was asked for.
#[derive(Debug)]
pub(super) struct Asked<K> {
    style: &'static Style,
    limit: u32,
    /// What the page before ended with.
    pub(super) after: Option<K>,
}

impl<K: FromStr + Display> Asked<K> {
    pub(super) fn read(query: &Query, style: &'static Style) -> Result<Self, Failure> {
        let limit = query.number("limit", 1, style.most)?.unwrap_or(style.usual);
        let from = query.get(style.from).filter(|text| !text.is_empty());
        let after = from.map(str::parse).transpose().map_err(|_| {
            let Style { from, shown, .. } = style;
            Failure::invalid(format!("`{from}` must be what `{shown}` said before"))
        })?;
        Ok(Asked {
            style,
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
            after,
        })
    }

    /// How many to look for: one more than go out, which tells whether there are more.
    pub(super) fn look_for(&self) -> u32 {
        self.limit.saturating_add(1)
    }

    /// The answer with what was found; `key` is an entry's place in the list. Entries that
    /// `body` has no form of are left out.
    pub(super) fn answer<T, B: Serialize>(
        self,
        mut found: Vec<T>,
        key: impl Fn(&T) -> K,
        body: impl Fn(T) -> Option<B>,
    ) -> Response {
        let limit = self.limit as usize;
        let more = found.len() > limit;
        found.truncate(limit);
        let last = found
            .last()
            .filter(|_| more)
            .map(|last| key(last).to_string());
        let body: Vec<B> = found.into_iter().filter_map(body).collect();
        let mut response = axum::Json(body).into_response();
        if let Some(last) = last
            && let Ok(value) = HeaderValue::from_str(&last)
        {
            response
                .headers_mut()
                .insert(self.style.next.clone(), value);
        }
        response
    }
}

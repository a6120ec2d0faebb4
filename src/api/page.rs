//! Lists: `limit`, an opaque `cursor`, and the answer's `next_cursor` and `Link`.

use axum::Json;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use url::form_urlencoded;

use super::extract::Params;
use super::problem::{Place, Problem};

/// Longest page.
const MOST: i64 = 200;

/// A page of a list.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Page<T> {
    /// The entries.
    items: Vec<T>,
    /// What to give as `cursor` for the entries after these; null at the end of the list.
    next_cursor: Option<String>,
    /// The query of the next page.
    #[serde(skip)]
    next: Option<String>,
}

impl<T: Serialize> IntoResponse for Page<T> {
    fn into_response(self) -> Response {
        // Relative to the request, whatever a proxy has put before its path.
        let link = self.next.as_ref().and_then(|query| HeaderValue::try_from(format!("<?{query}>; rel=\"next\"")).ok());
        let mut response = Json(self).into_response();
        response.headers_mut().extend(link.map(|link| (header::LINK, link)));
        response
    }
}

/// Which page is asked for. A cursor holds where the page before ended, and a mark of that and of the list it belongs to: one that was
/// changed, or is used with other filters, would skip entries in silence.
pub(super) struct Wanted<P> {
    limit: i64,
    /// What the list is, with its filters.
    list: Vec<u8>,
    /// The query of this page, without its cursor.
    query: Vec<(String, String)>,
    /// Where the page before ended.
    pub(super) after: Option<P>,
}

#[derive(Serialize, Deserialize)]
struct Cursor<P>(u64, P);

impl<P: Serialize + DeserializeOwned> Wanted<P> {
    /// Takes `limit` and `cursor`. `list` is what the list is, with its filters.
    pub(super) fn take(params: &mut Params, list: &impl Serialize) -> Result<Self, Problem> {
        let limit = match params.one::<String>("limit")? {
            None => 50,
            Some(text) => text.parse().ok().filter(|limit| (1..=MOST).contains(limit)).ok_or_else(|| {
                Problem::invalid_at(Place::Parameter("limit".into()), format!("must be a number from 1 to {MOST}"))
            })?,
        };
        let list = serde_json::to_vec(list).unwrap_or_default();
        let query = params.given().iter().filter(|(name, _)| name != "cursor").cloned().collect();
        let after = match params.one::<String>("cursor")? {
            None => None,
            Some(text) => {
                let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Problem::invalid_cursor())?;
                let Cursor(marked, after) = serde_json::from_slice(&bytes).map_err(|_| Problem::invalid_cursor())?;
                if marked != mark(&list, &after) {
                    return Err(Problem::invalid_cursor());
                }
                Some(after)
            }
        };
        Ok(Self { limit, list, query, after })
    }

    /// How many rows to read: one more than the page holds tells whether there is another page.
    pub(super) fn rows(&self) -> i64 {
        self.limit + 1
    }

    /// The page of the rows that were read. `place` is where an entry stands in the list.
    pub(super) fn page<T>(&self, mut rows: Vec<T>, place: impl Fn(&T) -> P) -> Page<T> {
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next_cursor = rows.last().filter(|_| more).map(|last| {
            let place = place(last);
            URL_SAFE_NO_PAD.encode(serde_json::to_vec(&Cursor(mark(&self.list, &place), place)).unwrap_or_default())
        });
        let next = next_cursor.as_deref().map(|cursor| {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.extend_pairs(&self.query).append_pair("cursor", cursor).finish()
        });
        Page { items: rows, next_cursor, next }
    }
}

/// The same for every replica, whatever it was built by: a cursor of one is good at another.
fn mark(list: &[u8], place: &impl Serialize) -> u64 {
    let hash = Sha256::new().chain_update(list).chain_update(serde_json::to_vec(place).unwrap_or_default()).finalize();
    hash.iter().take(8).fold(0, |mark, byte| mark << 8 | u64::from(*byte))
}

impl<T> Page<T> {
    /// The same page of other entries.
    pub(super) fn map<U>(self, entry: impl Fn(T) -> U) -> Page<U> {
        Page { items: self.items.into_iter().map(entry).collect(), next_cursor: self.next_cursor, next: self.next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_of_a_place_in_a_list_is_the_same_for_every_build() {
        assert_eq!(mark(br#"["workers",null]"#, &"w"), 547_498_537_319_880_209);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod fuzz {
    use axum::extract::FromRequestParts as _;
    use axum::http::Request;

    use super::*;

    type Place = (chrono::DateTime<chrono::Utc>, uuid::Uuid);

    #[test]
    fn a_cursor_of_any_kind_is_refused_or_is_one_of_this_list() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        bolero::check!().for_each(|bytes: &[u8]| {
            let place: Option<Place> = serde_json::from_slice(bytes).ok();
            let mark = mark(br#""a list""#, &place);
            let marked = [format!("[{mark},").as_bytes(), bytes, b"]"].concat();
            for cursor in [
                String::from_utf8_lossy(bytes).into_owned(),
                URL_SAFE_NO_PAD.encode(bytes),
                URL_SAFE_NO_PAD.encode(marked),
            ] {
                let query = form_urlencoded::Serializer::new(String::new()).append_pair("cursor", &cursor).finish();
                let (mut parts, ()) = Request::get(format!("/?{query}")).body(()).unwrap().into_parts();
                let mut params = runtime.block_on(Params::from_request_parts(&mut parts, &())).unwrap();
                if let Ok(wanted) = Wanted::<Place>::take(&mut params, &"a list") {
                    assert!(wanted.after.is_some() && wanted.after == place, "a place that was not marked");
                }
            }
        });
    }
}

//! What a run does when the slot of its workflow is taken.

use serde::{Deserialize, Serialize};

/// The four answers to a conflict. A paused workflow is paused for all of them; only `wait` is accepted then, and waits.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    sqlx::Type,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum OnConflict {
    /// It is refused, with the id of the run that has the slot.
    #[default]
    Reject,
    /// The run that has the slot is the answer.
    ReturnExisting,
    /// It waits its turn, by priority, then age.
    Wait,
    /// The run that has the slot is cancelled, and this one is next in line; it starts when that one's process is gone.
    Replace,
}

impl OnConflict {
    /// The name used in the API and in SQL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::ReturnExisting => "return_existing",
            Self::Wait => "wait",
            Self::Replace => "replace",
        }
    }
}

-- A date of the year 1, a clock that was wrong: the orders count, on the day that they name.
{{ config(severity='warn') }}

select
    order_id,
    created_date,
    event_ts
from {{ ref('fct_orders') }}
where
    {{ is_of_a_changed_day('created_date') }}
    and abs(timestamp_diff(created_date, event_ts, day)) > {{ var('most_days_from_event') }}

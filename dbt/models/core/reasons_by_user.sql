{{
    config(
        materialized='incremental',
        partition_by={'field': 'created_day', 'data_type': 'date', 'granularity': 'day'},
        cluster_by=['user_id'],
    )
}}

with

orders as (

    select * from {{ ref('fct_orders') }}
    where is_fraud and {{ is_of_a_changed_day('created_date') }}

),

by_day as (

    select
        date(orders.created_date) as created_day,
        orders.user_id,
        reason,
        count(*) as fraud_orders
    from orders
    cross join unnest(orders.reasons) as reason
    group by created_day, orders.user_id, reason

),

{{ and_of_all_days('by_day', keys=['user_id', 'reason'], counts=['fraud_orders']) }}

select * from final

{{
    config(
        materialized='incremental',
        partition_by={'field': 'created_day', 'data_type': 'date', 'granularity': 'month'},
    )
}}

with

orders as (

    select * from {{ ref('fct_orders') }}
    where is_fraud and {{ is_of_a_changed_day('created_date') }}

),

outcomes as (

    select order_id, outcome from {{ ref('stg_order_outcomes') }}
    where is_newest

),

looked_at as (

    select
        date(orders.created_date) as created_day,
        orders.order_date,
        orders.amount_numeric,
        orders.reasons,
        outcomes.outcome
    from orders
    left join outcomes on orders.order_id = outcomes.order_id

),

final as (

    select
        looked_at.created_day,
        looked_at.order_date,
        rule,
        count(*) as hits,
        sum({{ wide('looked_at.amount_numeric') }}) as amount,
        count(looked_at.outcome) as reviewed,
        countif(looked_at.outcome = 'fraud') as confirmed,
        sum(if(looked_at.outcome = 'fraud', {{ wide('looked_at.amount_numeric') }}, 0)) as saved_amount,
        sum(if(looked_at.outcome = 'genuine', {{ wide('looked_at.amount_numeric') }}, 0)) as wrongly_held_amount
    from looked_at
    cross join unnest(looked_at.reasons) as rule
    group by looked_at.created_day, looked_at.order_date, rule

)

select * from final

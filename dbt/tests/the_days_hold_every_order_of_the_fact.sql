with

counted as (

    select
        created_day,
        sum(total_orders) as total_orders
    from {{ ref('orders_by_day') }}
    where {{ is_of_a_changed_day('created_day', 'date') }}
    group by created_day

),

fact as (

    select
        date(created_date) as created_day,
        count(*) as total_orders
    from {{ ref('fct_orders') }}
    where {{ is_of_a_changed_day('created_date') }}
    group by created_day

)

select
    coalesce(counted.created_day, fact.created_day) as created_day,
    counted.total_orders as counted,
    fact.total_orders as orders
from counted
full outer join fact on counted.created_day = fact.created_day
where coalesce(counted.total_orders, 0) != coalesce(fact.total_orders, 0)
